"""FNA (fna, 2403.04690): fused, unfused and dense agree, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from tests.methods.cache.needles import pocket
from tests.methods.prefill.planted import context
from tests.methods.static.grids import axis_map, grid_map, masked_dense, qkv
from torch import Tensor

import saccade
from saccade.methods import build
from saccade.methods.static.fna import FNA
from saccade.methods.static.neighborhood import ImageNeighborhoodAttention, VideoNeighborhoodAttention, neighborhood_attention
from saccade.ops import attend
from saccade.parts.static.gridlists import grid_lists
from saccade.parts.static.neighborhood import Neighborhood

GRIDS = [
    ((37,), (6,), (1,), (1,), (False,)),
    ((37,), (7,), (1,), (5,), (True,)),
    ((150,), (70,), (1,), (1,), (False,)),
    ((11, 9), (4, 3), (1, 1), (1, 2), (False, False)),
    ((11, 9), (5, 9), (1, 1), (2, 1), (True, False)),
    ((4, 7, 6), (2, 3, 4), (1, 1, 1), (1, 2, 1), (True, False, False)),
]


def results(out: Tensor, inputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    """The output and all gradients under a fixed upstream gradient."""
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, inputs, upstream)]


@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_fused_unfused_and_dense_agree(case) -> None:
    n = math.prod(case[0])
    inputs = qkv(n, grad=True)
    exact = results(masked_dense(*inputs, grid_map(*case)), inputs)
    sizes = {"grid": case[0], "window": case[1], "dilation": case[3], "causal": case[4]}
    # fused: tiles of queries over their boxes; unfused: every query gathers its own keys
    for how in ({}, {"key_tile": 4}, {"tile": 1}, {"impl": "reference"}):
        got = results(neighborhood_attention(*inputs, **sizes, **how), inputs)
        for a, b in zip(got, exact, strict=True):
            assert (a - b).abs().max() < 1e-12, how


@pytest.mark.parametrize("sizes", [(13, 4, 1, 1, False), (13, 5, 1, 2, False), (13, 5, 1, 1, True)], ids=str)
def test_inverse_windows_are_the_transposed_rows(sizes) -> None:
    """The card's inverse formula for the queries that read key j, dilation group by group."""
    extent, window, _, dilation, causal = sizes
    pairs = axis_map(*sizes)
    for x in range(extent):
        residue, j = x % dilation, x // dilation
        length = -(-(extent - residue) // dilation)
        left, right = window // 2, window - 1 - window // 2
        if causal:
            first, last = j, min(j + window, length)
        else:
            first = 0 if j < window else j - right
            last = length if j >= length - window else j + left + 1
        readers = [residue + i * dilation for i in range(first, last)]
        assert pairs[:, x].nonzero().flatten().tolist() == readers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision_is_that_of_dense_attention(dtype: torch.dtype) -> None:
    q, k, v = qkv(12 * 12, dim=32)
    pairs = grid_map((12, 12), (5, 5), (1, 1), (1, 1), (False, False))
    exact = masked_dense(q, k, v, pairs)
    low = [x.to(dtype) for x in (q, k, v)]
    bias = torch.zeros(144, 144).masked_fill(~pairs, -torch.inf)[None, None]
    dense = attend(*low, causal=False, bias=bias).out
    for how in ({}, {"key_tile": 4}):
        got = neighborhood_attention(*low, grid=(12, 12), window=5, **how)
        assert (got - exact).abs().max() <= 2 * (dense - exact).abs().max() + 1e-6


def test_masks_take_no_room_of_queries_by_keys() -> None:
    """Memory beyond the inputs: lists and a few channels, whatever the grid; in the lists of one axis the channels stay few too."""
    lists = grid_lists(Neighborhood.of((64, 64), 13), (8, 8), None, 0, "cpu")
    assert lists.row_bits is not None and lists.row_bits.shape == (4096, 40)  # 2 * (8 + 13 - 1)
    long = grid_lists(Neighborhood.of(4096, 513), (32,), None, 0, "cpu")
    assert long.twice and long.row_bits is not None and long.row_bits.shape[1] <= 130
    keys = int(lists.selection.token_counts.max())
    assert keys == 400


def test_work_follows_the_window() -> None:
    counts = []
    q, k, v = qkv(48 * 48, heads=1, kv_heads=1, batch=1, dtype=torch.float32)
    for window in (5, 10, 20):
        neighborhood_attention(q, k, v, grid=(48, 48), window=window)
        run = saccade.last_run()
        assert run.selection is not None
        counts.append(float(run.selection.pairs().sum()) / run.n_q)
    assert counts[0] < counts[1] < counts[2] <= (20 + 8) ** 2


def test_in_a_decoder_every_query_has_its_own_window() -> None:
    q, k, v = qkv(260)
    for window, dilation, n_q in ((40, 1, 260), (40, 1, 77), (9, 4, 260), (9, 4, 61), (200, 1, 260)):
        pairs = axis_map(260, window, 1, dilation, True)
        exact = masked_dense(q, k, v, pairs)[:, :, -n_q:]
        part = q[:, :, -n_q:]
        method, ctx = FNA(window=window, dilation=dilation), context(part, k, v)
        assert (method.attend(ctx, part, k, v) - exact).abs().max() < 1e-12
        assert torch.equal(method.select(ctx, part, k, v).dense_mask()[0, 0], pairs[-n_q:])


def test_on_the_pocket_model_a_window_sees_no_further() -> None:
    """Logits after the prompt's first tokens changed: with windows of 40 in 8 layers nothing beyond 8 * 39 tokens is felt."""
    model = pocket()
    ids = torch.randint(3, 259, (1, 700), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 1
    other = ids.clone()
    other[0, 1:40] = 70
    with saccade.attach(model, prefill="fna(window=40)") as handle, torch.no_grad():
        a, b = model(ids).logits, model(other).logits
        density = handle.stats().prefill_density
    reach = 40 + 8 * 39
    assert torch.equal(a[:, reach:], b[:, reach:]) and not torch.equal(a[:, 60:100], b[:, 60:100])
    assert density is not None and density < 0.25
    with torch.no_grad():
        assert not torch.equal(model(ids).logits[:, reach:], model(other).logits[:, reach:])


@pytest.mark.parametrize(
    ("module", "shape", "sizes"),
    [
        (ImageNeighborhoodAttention, (2, 9, 10), {"window": 5}),
        (ImageNeighborhoodAttention, (2, 8, 8), {"window": 4, "stride": 2, "dilation": (1, 2)}),
        (VideoNeighborhoodAttention, (1, 4, 6, 6), {"window": (2, 3, 3), "causal": (True, False, False)}),
    ],
)
def test_modules(module: type, shape: tuple[int, ...], sizes: dict) -> None:
    torch.manual_seed(0)
    layer = module(24, 3, **sizes).double()
    x = torch.randn(*shape, 24, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == x.shape
    q, k, v = layer.qkv(x.flatten(1, -2)).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (3, 8)).transpose(1, 2) for y in (q, k, v))
    hood = Neighborhood.of(shape[1:], **sizes)
    exact = masked_dense(q, k, v, grid_map(hood.grid, hood.window, hood.stride, hood.dilation, hood.causal))
    assert (out - layer.project(exact.transpose(1, 2).flatten(2)).view_as(out)).abs().max() < 1e-12
    out.square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="takes"):
        layer(x.flatten(1, 2))


def test_fields_are_checked() -> None:
    for spec in ("fna(window=0)", "fna(dilation=-1)", "fna(window=2.5)"):
        with pytest.raises(ValueError, match="not a whole number"):
            build(spec)
    with pytest.raises(ValueError, match="multiple of heads"):
        ImageNeighborhoodAttention(25, 3, window=3)
