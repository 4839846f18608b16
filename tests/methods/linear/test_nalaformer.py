"""nalaformer: the length of a query sets how sharp its row is, signs are kept."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import saccade
from saccade.parts.linear.features import squashed_exp


def layer(spec: str = "nalaformer(rotary=False)", seed: int = 0):
    torch.manual_seed(seed)
    return saccade.mixer(spec, dim=32, heads=4).double()


def heads(n: int = 49):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, n, 8, dtype=torch.float64, generator=draw) for _ in range(2))


def entropy(weights: torch.Tensor) -> float:
    return float(-(weights * weights.clamp(min=1e-300).log()).sum(-1).mean())


@torch.no_grad()
def test_longer_queries_have_sharper_rows():
    """The entropy of a row falls with the query's length at one direction; relu and elu maps with a division don't see the length."""
    made = layer()
    q, k = heads()
    q = q / q.norm(dim=-1, keepdim=True)
    found = {"norm-aware": [], "relu": []}
    for length in (0.01, 0.5, 1.0, 1.5, 2.0):
        found["norm-aware"].append(entropy(made.weights(*made.maps(length * q, k), (7, 7))))
        s = (length * q).relu() @ k.relu().mT + 1e-300
        found["relu"].append(entropy(s / s.sum(-1, keepdim=True)))
    sharp = found["norm-aware"]
    assert all(b < a - 0.01 for a, b in pairwise(sharp)), sharp
    assert max(found["relu"]) - min(found["relu"]) < 1e-9


@torch.no_grad()
def test_exponents_run_from_half_to_one_and_a_half_of_the_power():
    made = layer()
    one = torch.tensor([0.6, 0.8, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    for length, r in ((1e-9, 1.5), (1.0, 3 * (0.5 + torch.tanh(torch.tensor(1.0, dtype=torch.float64)).item())), (50.0, 4.5)):
        phi = made.maps(length * one, one)[0]
        # a unit length is kept up to 1e-12 / |q|^2
        assert (phi[:2] - one[:2] ** r).abs().max() < (1e-8 if length > 1e-3 else 1)
        assert not phi[2:].any()
    assert not made.maps(0 * one, one)[0].any()


@torch.no_grad()
def test_weights_are_not_negative_and_sum_to_1_without_rotation():
    made = layer()
    q, k = heads()
    weights = made.weights(*made.maps(q, k), (7, 7))
    assert weights.min() >= 0 and (weights.sum(-1) - 1).abs().max() < 1e-4
    made.eps = 0.0
    assert (made.weights(*made.maps(q, k), (7, 7)).sum(-1) - 1).abs().max() < 1e-12
    turned = layer("nalaformer")
    assert (turned.weights(*turned.maps(q, k), (7, 7)).sum(-1) - 1).abs().max() > 1e-3


@torch.no_grad()
def test_signs_are_kept():
    """A query and its negative read other tokens; only channels of one sign meet."""
    made = layer()
    q, k = heads()
    one, other = (made.weights(*made.maps(x, k), (7, 7)) for x in (q, -q))
    assert (one - other).abs().sum(-1).min() > 0.2
    assert made.maps(q, k)[0].shape[-1] == 16
    only = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    only[..., 0] = 1.0
    same, opposite = (made.maps(only, s * only) for s in (1, -1))
    assert (same[0] @ same[1].mT).item() == pytest.approx(1) and (opposite[0] @ opposite[1].mT).item() == 0
    # a map that only squeezes lets opposite signs meet
    assert (squashed_exp(only) @ squashed_exp(-only).mT).item() > 1


@torch.no_grad()
def test_each_half_of_the_features_is_turned_alike():
    made = layer("nalaformer")
    x = torch.randn(1, 4, 49, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    both = made.turned(torch.cat([x, 2 * x], -1), (7, 7))
    alone = made.rotary(x, (7, 7))
    assert (both - torch.cat([alone, 2 * alone], -1)).abs().max() < 1e-14


def test_queries_of_zeros_give_finite_gradients():
    made = layer("nalaformer(kernel=0)")
    with torch.no_grad():
        made.q_proj.weight.zero_()
        made.q_proj.bias.zero_()
    x = torch.randn(1, 16, 32, dtype=torch.float64, requires_grad=True)
    made(x)[0].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_wrong_fields_are_refused():
    for spec, message in (("power=1.0", "at least 2"), ("key_power=2", "odd number")):
        with pytest.raises(ValueError, match=message):
            layer(f"nalaformer({spec})")
