"""mala: affine rows that sum to 1, whose spread grows with the query's length; places on the image."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear import bidir_linear
from saccade.parts.linear.grid import AxialRotary, GridConv, image_grid


def layer(spec: str = "mala(rotary=False)", seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def features(made, n: int = 49):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64, generator=draw) for _ in range(3))
    return *made.maps(q, k), v


@torch.no_grad()
def test_rows_sum_to_1_and_both_forms_agree():
    made = layer()
    q, k, v = features(made)
    weights = made.weights(q, k, (7, 7))
    # the guard of 1e-6 takes S / (S + 1e-6) - 1 off
    total = (q @ k.mT).sum(-1)
    assert (weights.sum(-1) - 1 + 1e-6 / (total + 1e-6)).abs().max() < 1e-12
    assert (weights @ v - made.read(q, k, v, (7, 7))).abs().max() < 1e-12
    assert (made.read(q, k, v, (7, 7)) - bidir_linear(q, k, v, "affine", eps=1e-6)).abs().max() < 1e-12
    made.eps = 0.0
    assert (made.weights(q, k, (7, 7)).sum(-1) - 1).abs().max() < 1e-12
    turned = layer("mala")
    assert (turned.weights(q, k, (7, 7)).sum(-1) - 1).abs().max() > 1e-3  # the identity ends with the rotary embedding


@torch.no_grad()
def test_longer_queries_spread_their_weights_and_may_subtract():
    """By a factor of the features: plain linear attention stays the same, this does not; short queries tend to plain linear attention."""
    made = layer()
    q, k, _ = features(made)
    made.eps = 0.0
    plain = (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True)
    spread = [float(made.weights(c * q, k, (7, 7)).std(-1).mean()) for c in (1e-6, 1.0, 4.0, 16.0)]
    assert spread == sorted(spread) and spread[-1] > 3 * spread[0]
    assert (made.weights(1e-9 * q, k, (7, 7)) - plain).abs().max() < 1e-9
    assert made.weights(16 * q, k, (7, 7)).min() < 0


@torch.no_grad()
def test_outputs_do_not_grow_with_the_number_of_tokens():
    made = layer("mala(kernel=0, rotary=False)")
    x = torch.randn(1, 16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (made(x.repeat(1, 9, 1))[0][:, :16] - made(x)[0]).abs().max() < 1e-12


@torch.no_grad()
def test_tokens_know_their_rows_and_columns():
    """Without rotation and convolution the order of the tokens is free; with one of them it is not."""
    order = torch.randperm(36, generator=torch.Generator().manual_seed(3))
    x = torch.randn(2, 36, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for fields, free in (("kernel=0, rotary=False", True), ("kernel=0", False), ("rotary=False", False)):
        made = layer(f"mala({fields})")
        assert ((made(x[:, order])[0] - made(x)[0][:, order]).abs().max() < 1e-12) == free
    # a square is found, and the same tokens make another image in another grid
    made = layer("mala")
    wide = layer("mala(grid=(4, 9))")
    assert torch.equal(made(x)[0], layer("mala(grid=(6, 6))")(x)[0]) and (made(x)[0] - wide(x)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_rotary_embedding_counts_rows_and_columns_apart():
    turn = AxialRotary(8)
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).expand(1, 1, 24, 8)
    turned = turn(x, (4, 6))[0, 0].reshape(4, 6, 8)
    assert torch.equal(turned[0, :, 4:], turned[3, :, 4:]) and torch.equal(turned[:, 0, :4], turned[:, 5, :4])
    scores = (turn(x, (4, 6)) @ turn(x, (4, 6)).mT)[0, 0].reshape(4, 6, 4, 6)
    assert (scores[0, 1, 2, 3] - scores[1, 2, 3, 4]).abs() < 1e-12 < (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs()


@torch.no_grad()
def test_the_convolution_reads_neighbours_on_the_map():
    conv = GridConv(4, 3).double()
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    other = x.clone()
    other[:, 7] += 1  # row 1, column 2 of 4 x 5
    change = (conv(other, (4, 5)) - conv(x, (4, 5))).abs().amax(-1)[0]
    assert set(change.nonzero().flatten().tolist()) == {1, 2, 3, 6, 7, 8, 11, 12, 13}
    # parts of the channels share the weights
    same = conv(torch.cat([x[..., :4], x[..., :4]], -1), (4, 5))
    assert torch.equal(same[..., :4], same[..., 4:])
    # a short last row is an image whose rest is 0
    full = torch.cat([x[:, :18], torch.zeros(1, 2, 8, dtype=torch.float64)], 1)
    assert (conv(x[:, :18], (4, 5)) - conv(full, (4, 5))[:, :18]).abs().max() < 1e-14


def test_what_does_not_fit_is_refused():
    assert image_grid(49, None) == (7, 7) and image_grid(50, (0, 8)) == (7, 8) and image_grid(12, (3, 4)) == (3, 4)
    with pytest.raises(ValueError, match="48 tokens make no square image"):
        layer("mala")(torch.randn(1, 48, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="don't fill an image of 4 x 4"):
        layer("mala(grid=(4, 4))")(torch.randn(1, 48, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="a multiple of 4"):
        layer("mala", heads=16)
    with pytest.raises(ValueError, match="leave out kv_heads"):
        layer("mala", kv_heads=2)
    for spec, message in (("mala(grid=(4,))", r"give \(height, width\)"), ("mala(kernel=4)", "odd width")):
        with pytest.raises(ValueError, match=message):
            layer(spec)
