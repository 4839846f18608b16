"""local-linear-attention: exact on linear values, softmax and linear regression as its limits, two solvers, one gradient."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear.solve import conjugate_gradients, solve

PLAIN = "qk_norm=False, rotary=False"


def layer(spec: str, seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def tokens(n: int = 60) -> torch.Tensor:
    return torch.randn(2, n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def read(made, q, k, v):
    n = q.shape[2]
    own = torch.arange(n).expand(q.shape[0], -1)
    return made.read(q, k, v, torch.zeros(q.shape[0], n, 32, dtype=q.dtype), made.whole(torch.zeros(q.shape[0], n, 32)), own, own)


@torch.no_grad()
def test_linear_values_are_reproduced_at_the_query():
    """v = A k + b gives A q + b as the ridge goes to 0; softmax gives the value of a mean of keys instead."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 60, 8, dtype=torch.float64), torch.randn(2, 4, 60, 8, dtype=torch.float64)
    a, b = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    v, truth = k @ a.mT + b, q @ a.mT + b
    late = slice(30, None)  # rows with more keys than channels
    errors = []
    for ridge in (1e-2, 1e-4, 1e-8):
        made = layer(f"local-linear-attention(ridge={ridge}, steps=200, {PLAIN})")
        errors.append(float((read(made, q, k, v) - truth)[:, :, late].abs().max()))
    assert errors[1] < errors[0] / 20 and errors[2] < 1e-5, errors
    softmax = (q @ k.mT * 8**-0.5).masked_fill(torch.ones(60, 60).triu(1).bool(), float("-inf")).softmax(-1) @ v
    assert float((softmax - truth)[:, :, late].abs().mean()) > 0.5


@torch.no_grad()
def test_zero_slope_is_softmax():
    x = tokens()
    for fields in (PLAIN, "window=9"):
        exact = layer(f"softmax({'rotary=False' if fields == PLAIN else 'window=9, qk_norm=True'})", kv_heads=2)
        made = layer(f"local-linear-attention(ridge=1e14, {fields})", kv_heads=2)
        made.load_state_dict(exact.state_dict(), strict=False)
        assert (made(x)[0] - exact(x)[0]).abs().max() < 1e-11


@torch.no_grad()
def test_an_endless_bandwidth_is_linear_regression():
    """scale 0: the ridge regression of the values so far on the keys so far, with a free constant, read at the query."""
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 1, 40, 8, dtype=torch.float64) for _ in range(3))
    out = read(layer(f"local-linear-attention(scale=0.0, ridge=0.03, {PLAIN})"), q, k, v)
    for i in (0, 3, 7, 8, 39):
        keys, values = k[0, 0, : i + 1], v[0, 0, : i + 1]
        centred = keys - keys.mean(0)
        slope = torch.linalg.solve(centred.mT @ centred + 0.03 * (i + 1) * torch.eye(8, dtype=torch.float64), centred.mT @ values)
        assert (values.mean(0) + (q[0, 0, i] - keys.mean(0)) @ slope - out[0, 0, i]).abs().max() < 1e-12


@torch.no_grad()
def test_rows_sum_to_1():
    x = tokens()
    for fields in ("", "affine=False", "learned=True", "window=12", "scale=2.0"):
        made = layer(f"local-linear-attention({fields})")
        call = made.whole(x)
        q, (k, _) = made.queries(x, call), made.keys(x, call)
        mask = torch.ones(60, 60, dtype=torch.bool).tril()
        weights = made.weights(q, k, mask, made.ridge(x))
        assert (weights.sum(-1) - 1).abs().max() < 1e-9 and weights.min() < 0
        # and what runs leaves constant values as they are
        constant = torch.ones(2, 4, 60, 3, dtype=torch.float64)
        own = torch.arange(60).expand(2, -1)
        assert (made.read(q, k, constant, x, call, own, own) - 1).abs().max() < 1e-12


def test_conjugate_gradients_equal_the_direct_solve():
    x = tokens()
    direct = layer("local-linear-attention(solver='direct')", kv_heads=2)
    grads = []
    for spec in ("solver='direct'", "", "jacobi=True"):
        made = layer(f"local-linear-attention({spec})", kv_heads=2)
        made.load_state_dict(direct.state_dict())
        y = made(x, keep=False)[0]
        assert (y - direct(x)[0]).abs().max() < 1e-11
        grads.append(torch.autograd.grad(y.sin().sum(), list(made.parameters())))
    for other in grads[1:]:
        for a, b in zip(other, grads[0], strict=True):
            assert (a - b).abs().max() < 1e-9 * (1 + b.abs().max())


def test_rows_of_a_solve_stop_on_their_own_and_gradients_need_no_steps():
    torch.manual_seed(3)
    half = torch.randn(5, 6, 6, dtype=torch.float64)
    a = (half @ half.mT + 0.1 * torch.eye(6)).requires_grad_()
    b = torch.randn(5, 6, dtype=torch.float64)
    b[2] = 0
    b.requires_grad_()

    def product(x: torch.Tensor) -> torch.Tensor:
        return (a @ x.unsqueeze(-1)).squeeze(-1)

    x, exact = solve(product, b, steps=60), torch.linalg.solve(a, b.unsqueeze(-1)).squeeze(-1)
    assert (x - exact).abs().max() < 1e-9 and not x[2].any()
    found, expected = (torch.autograd.grad(y.square().sum(), (a, b)) for y in (x, exact))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-8 * (1 + other.abs().max())
    diagonal = torch.diag_embed(torch.logspace(-6, 6, 6, dtype=torch.float64))
    count = 0

    def scaled(x: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return (diagonal @ x.unsqueeze(-1)).squeeze(-1)

    conjugate_gradients(scaled, torch.ones(1, 6, dtype=torch.float64), diagonal=diagonal.diagonal(dim1=-2, dim2=-1))
    assert count == 1  # the preconditioner is the inverse


@torch.no_grad()
def test_a_learned_ridge_starts_as_given():
    assert (layer("local-linear-attention(learned=True, ridge=0.07)").ridge(tokens()) - 0.07).abs().max() < 1e-7


@torch.no_grad()
def test_it_recalls_linear_maps_in_context_better_than_softmax():
    """Test-time regression: keys and values of a random linear map with noise, read at new queries."""
    torch.manual_seed(4)
    k, q = torch.randn(4, 4, 60, 8, dtype=torch.float64), torch.randn(4, 4, 60, 8, dtype=torch.float64)
    a = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    v = k @ a.mT + 0.1 * torch.randn(4, 4, 60, 8, dtype=torch.float64)
    errors = []
    for ridge in (0.05, 1e9):
        made = layer(f"local-linear-attention(ridge={ridge}, {PLAIN})")
        errors.append(float((read(made, q, k, v) - q @ a.mT)[:, :, 30:].norm()))
    assert errors[0] < 0.35 * errors[1], errors


def test_wrong_fields_are_refused():
    for spec, message in (
        ("ridge=0", "give more than 0"), ("solver='lu'", "is not 'cg' or 'direct'"), ("steps=0", "at least 1"),
        ("scale=-1.0", "at least 0"),
        ("window=0", "at least 1 token"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            saccade.mixer(f"local-linear-attention({spec})", dim=32, heads=4)
