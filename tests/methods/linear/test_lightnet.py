"""lightnet: the additive recurrence as a softmax over tokens per channel, and positions on grids."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan
from saccade.parts.linear.lrpe import Lrpe
from saccade.parts.linear.toeplitz import ExponentialToeplitz, running


def made(spec: str, n: int = 60):
    torch.manual_seed(0)
    layer = saccade.mixer(spec, dim=32, heads=4).double()
    return layer, 2 * torch.randn(2, n, 32, dtype=torch.float64)


def inner(layer, x: torch.Tensor):
    call = layer.whole(x)
    q, k, v, _ = layer.project(x, {}, call)
    return *layer.features(q, k, call), v, call


def test_the_recurrence_is_a_softmax_over_tokens_for_each_channel():
    layer, x = made("lightnet", n=100)
    q, k, v, call = inner(layer, x)
    z = k.logcumsumexp(2)
    gate = torch.nn.functional.pad(z[:, :, :-1] - z[:, :, 1:], (0, 0, 1, 0))  # 0 for the first token
    scanned = scan(q, (k - z).exp(), v, log_decay=gate, scale=1.0, impl="reference")[0]
    rows = torch.cat([q[:, :, t : t + 1] @ (k[:, :, : t + 1].softmax(2).mT @ v[:, :, : t + 1]) for t in range(100)], dim=2)
    assert (scanned - rows).abs().max() < 1e-13
    y = layer.finish(layer.normaliser.after(rows, call, None), x)
    assert (layer(x)[0] - y).abs().max() < 1e-12


def test_keys_sum_to_one_over_time_in_every_channel():
    layer, x = made("lightnet")
    _, k, _, call = inner(layer, 20 * x)
    gated = layer.gate(x, k, None, call)
    ones = torch.ones_like(k[..., :1])
    state = scan(k, gated.keys, ones, log_decay=gated.log_decay, scale=1.0)[1]
    assert isinstance(state, torch.Tensor) and (state - 1).abs().max() < 1e-12
    both = made("lightnet(bidirectional=True)")[0].gate(x, k, None, call)
    assert both.log_decay is None and (both.keys.sum(2) - 1).abs().max() < 1e-12


def test_without_order_tokens_may_be_shuffled():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    layer, x = made("lightnet(bidirectional=True)")
    assert (layer(x[:, order])[0] - layer(x)[0][:, order]).abs().max() < 1e-12
    placed, _ = made("lightnet(bidirectional=True, lrpe=True)")
    assert (placed(x[:, order])[0] - placed(x)[0][:, order]).abs().max() > 1e-6
    # with their places they may again
    assert (placed(x[:, order], positions=order[None])[0] - placed(x)[0][:, order]).abs().max() < 1e-12


def test_positions_on_a_grid_depend_on_the_distance_along_each_axis():
    torch.manual_seed(2)
    part = Lrpe(2, 6, grid=(4, 5)).double()
    x = torch.randn(1, 2, 1, 6, dtype=torch.float64).expand(1, 2, 20, 6)
    turned = part(x, torch.arange(20)[None])
    products = (turned @ turned.mT)[0].unflatten(-1, (4, 5)).unflatten(-3, (4, 5))  # (H, 4, 5, 4, 5)
    for down in range(4):
        for right in range(5):
            angles = torch.cat([down * part.theta[:, :3], right * part.theta[:, 3:]], dim=1)
            expected = (x[0, :, 0] ** 2 * angles.cos()).sum(-1)
            assert torch.allclose(products[:, 0, 0, down, right], expected)
    assert torch.allclose(products[:, 0, 0, 2, 3], products[:, 1, 1, 3, 4])


def test_the_toeplitz_product_is_the_matrix_it_says():
    torch.manual_seed(3)
    n, part = 12, ExponentialToeplitz(5, grid=(3, 4), bidirectional=True).double()
    part.weight.data.normal_()
    x = torch.randn(2, n, 5, dtype=torch.float64)
    layer, _ = made("lightnet")
    y = part(x, {}, layer.whole(x))[0]
    lam = part.logit.sigmoid()
    grid = x.unflatten(1, (3, 4))
    for axis, size in enumerate((3, 4)):
        distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
        matrix = part.weight[axis] * lam[axis] ** distance.unsqueeze(-1)
        grid = grid + torch.einsum("ijc,bjkc->bikc" if axis == 0 else "ijc,bkjc->bkic", matrix, grid)
    assert (y - grid.flatten(1, 2)).abs().max() < 1e-12
    causal = running(x, lam[0].log())
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for t in range(n):
        expected = lam[0] * expected + x[:, t]
        assert (causal[:, t] - expected).abs().max() < 1e-12


def test_wrong_fields_are_refused():
    for spec, message in (("lightnet(rank=0)", "give at least 1"), ("lightnet(grid=(4, 4))", "add bidirectional=True")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
    layer, x = made("lightnet(bidirectional=True, toeplitz=True, grid=(7, 7))")
    with pytest.raises(ValueError, match="60 tokens are no grid of 7 x 7"):
        layer(x)
