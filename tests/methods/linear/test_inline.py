"""inline: rows by subtraction, queries told apart, the local residual."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear import bidir_linear


def layer(spec: str = "inline", seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def heads(n: int = 49):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, n, 8, dtype=torch.float64, generator=draw) for _ in range(3))


@torch.no_grad()
def test_rows_sum_to_1_and_tell_multiples_apart():
    """q and 2 q have other rows here and the same under a division; weights may be negative."""
    q, k, v = heads()
    for name in ("identity", "relu", "leaky-relu", "exp"):
        made = layer(f"inline(feature_map='{name}')")
        phi = made.maps(q, k)
        weights = made.weights(*phi, (7, 7))
        assert (weights.sum(-1) - 1).abs().max() < 1e-12
        assert (weights @ v - made.read(*phi, v, (7, 7))).abs().max() < 1e-12
        change = (made.weights(*made.maps(2 * q, k), (7, 7)) - weights).abs().amax(-1)
        assert change[phi[0].abs().amax(-1) > 1e-3].min() > 1e-6
    made = layer("inline(feature_map='relu')")
    divided = [bidir_linear(*made.maps(c * q, k), v, "sum", eps=1e-30) for c in (1, 2)]
    assert (divided[0] - divided[1]).abs().max() < 1e-12
    assert layer().weights(*layer().maps(8 * q, k), (7, 7)).min() < 0


@torch.no_grad()
def test_outputs_do_not_grow_with_the_number_of_tokens():
    made = layer("inline(kernel=0)")
    x = torch.randn(1, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (made(x.repeat(1, 9, 1))[0][:, :16] - made(x)[0]).abs().max() < 1e-12


@torch.no_grad()
def test_without_its_residual_it_has_no_notion_of_place():
    x = torch.randn(2, 49, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(49, generator=torch.Generator().manual_seed(4))
    made = layer()
    assert (made(x[:, order])[0] - made(x)[0][:, order]).abs().max() > 1e-3
    for weight in made.residual[2].parameters():
        weight.zero_()
    assert (made(x[:, order])[0] - made(x)[0][:, order]).abs().max() < 1e-12
    plain = layer("inline(kernel=0)")
    plain.load_state_dict(made.state_dict(), strict=False)
    assert (plain(x)[0] - made(x)[0]).abs().max() < 1e-13


@torch.no_grad()
def test_every_sample_has_a_kernel_of_its_own():
    """The residual is a convolution by the 9 numbers that its network gives for each channel of that sample."""
    made = layer()
    x = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    v = torch.randn(2, 20, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    found = made.around(v, x, (4, 5))
    kernels = made.residual(x.mean(1).unsqueeze(-1)).reshape(2, 32, 3, 3)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-3
    padded = torch.nn.functional.pad(v.mT.reshape(2, 32, 4, 5), (1, 1, 1, 1))
    expected = sum(kernels[:, :, i, j, None, None] * padded[:, :, i : i + 4, j : j + 5] for i in range(3) for j in range(3))
    assert (found - expected.flatten(2).mT).abs().max() < 1e-12


@torch.no_grad()
def test_a_class_token_stays_out_of_the_image():
    made = layer("inline(cls=True)")
    x = torch.randn(1, 50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    v = x.clone()
    v[:, 0] += 5
    assert torch.equal(made.around(v, x, (7, 7)), made.around(x, x, (7, 7))) and not made.around(v, x, (7, 7))[:, 0].any()
    with pytest.raises(ValueError, match="50 tokens make no square"):
        layer("inline")(x)
    with pytest.raises(ValueError, match="feature_map='gelu' is not known"):
        layer("inline(feature_map='gelu')")
