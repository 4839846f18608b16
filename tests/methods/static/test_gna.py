"""GNA (gna, 2504.16922): strided neighbourhoods on grids and in decoders, and the simulator."""

from __future__ import annotations

import math

import pytest
import torch
from tests.methods.prefill.planted import context
from tests.methods.static.grids import axis_map, grid_map, masked_dense, qkv

import saccade
from saccade.methods import build
from saccade.methods.static.gna import GNA
from saccade.methods.static.neighborhood import neighborhood_attention
from saccade.parts.static.gridattend import query_tile
from saccade.parts.static.neighborhood import Neighborhood
from saccade.parts.static.simulate import measure, simulate

SAME = 1e-12
# grid, window, stride, dilation, causal
GRIDS = [
    ((41,), (8,), (3,), (1,), (False,)),
    ((41,), (7,), (5,), (3,), (False,)),
    ((41,), (8,), (3,), (2,), (True,)),
    ((64,), (16,), (16,), (1,), (False,)),
    ((100,), (40,), (32,), (1,), (True,)),
    ((9, 10), (4, 5), (2, 3), (2, 1), (False, True)),
    ((12, 13), (12, 5), (1, 2), (1, 2), (False, False)),
    ((8, 16), (4, 8), (4, 8), (1, 1), (False, False)),
    ((5, 6, 7), (5, 4, 3), (1, 2, 3), (1, 1, 2), (True, False, False)),
    ((4, 8, 8), (4, 4, 4), (1, 4, 4), (1, 1, 1), (False, False, False)),
]


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("case", GRIDS, ids=str)
def test_equals_masked_dense(case, extra: int) -> None:
    grid, window, stride, dilation, causal = case
    n = math.prod(grid)
    q, k, v = qkv(n + extra)
    pairs = torch.ones(n + extra, n + extra, dtype=torch.bool)
    pairs[:n, :n] = grid_map(*case)
    exact = masked_dense(q, k, v, pairs)
    sizes = {"grid": grid, "window": window, "stride": stride, "dilation": dilation, "causal": causal, "extra": extra}
    for tiles in ({}, {"tile": 4}, {"tile": 3, "key_tile": 2}, {"key_tile": 4}, {"tile": 1}):
        got = neighborhood_attention(q, k, v, **sizes, **tiles)
        assert (got - exact).abs().max() < SAME, tiles
    if extra:
        turned = [torch.cat([x[:, :, n:], x[:, :, :n]], 2) for x in (q, k, v)]
        got = neighborhood_attention(*turned, **sizes, extra_side="first")
        assert (torch.cat([got[:, :, extra:], got[:, :, :extra]], 2) - exact).abs().max() < SAME


@pytest.mark.parametrize("case", [c for c in GRIDS if not any(c[4])], ids=str)
def test_every_row_has_as_many_keys_as_the_window(case) -> None:
    """Counted in the function's own output: values that are one-hot give back the weights."""
    n = math.prod(case[0])
    q, k, _ = qkv(n, heads=2)
    v = torch.eye(n, dtype=q.dtype).expand(2, 2, -1, -1)
    weights = neighborhood_attention(q, k, v, grid=case[0], window=case[1], stride=case[2], dilation=case[3])
    assert (weights > 0).sum(-1).unique().tolist() == [math.prod(case[1])]
    assert torch.equal(weights[0, 0] > 0, grid_map(*case))


def test_limits() -> None:
    q, k, v = qkv(8 * 12)
    full = masked_dense(q, k, v, torch.ones(96, 96, dtype=torch.bool))
    assert (neighborhood_attention(q, k, v, grid=(8, 12), window=None) - full).abs().max() < SAME
    alone = neighborhood_attention(q, k, v, grid=(8, 12), window=1)
    assert (alone - v.repeat_interleave(2, 1)).abs().max() < SAME
    blocks = neighborhood_attention(q, k, v, grid=(8, 12), window=4, stride=4)
    block_of = torch.arange(8).view(-1, 1) // 4 * 3 + torch.arange(12) // 4
    own = block_of.flatten().unsqueeze(1) == block_of.flatten()
    assert (blocks - masked_dense(q, k, v, own)).abs().max() < SAME
    assert torch.equal(axis_map(64, 16, 16, 1, False), axis_map(64, 16, 16, 1, False).T)


def test_simulator_gives_the_card_s_numbers() -> None:
    for stride, static, dynamic in ((1, 6.56, 6.56), (64, 6.56, 8.0), (128, 8.0, 8.0)):
        found = simulate(Neighborhood.of(2048, 256, stride), (64,))
        assert found.flop_bound == 8.0
        assert (round(found.static, 2), round(found.dynamic, 2)) == (static, dynamic)
        assert found.perfect == (stride == 128)


@pytest.mark.parametrize(
    ("hood", "tile", "key_tile"),
    [
        (((2048,), 256, 1), (64,), None),
        (((2048,), 256, 64), (64,), None),
        (((2048,), 256, 128), (64,), None),
        (((2048,), 256, 96), (128,), (64,)),
        (((8, 44, 80), (None, 12, 24), (1, 4, 8)), (1, 4, 8), (2, 4, 8)),
        (((8, 44, 80), (None, 20, 40), (1, 4, 8)), (2, 4, 8), (1, 4, 8)),
        (((6, 44, 80), (None, 4, 16), 1, (1, 11, 5)), (2, 4, 4), None),
        (((12, 24, 40), (6, 8, 8), 1, 1, (True, False, False)), (4, 4, 4), None),
    ],
    ids=str,
)
def test_simulator_against_the_tiles_of_the_selection(hood, tile, key_tile) -> None:
    hood = Neighborhood.of(*hood)
    found, (static, dynamic) = simulate(hood, tile, key_tile), measure(hood, tile, key_tile)
    assert found.static == pytest.approx(static, rel=0.1)
    assert found.dynamic == pytest.approx(dynamic, rel=0.1)
    assert found.static <= found.flop_bound * 1.0001 or any(hood.causal)


def test_aligned_windows_are_read_without_masks_or_waste() -> None:
    q, k, v = qkv(16 * 16, heads=2)
    with torch.no_grad():
        neighborhood_attention(q, k, v, grid=(16, 16), window=8, stride=8, key_tile=(8, 8))
    run = saccade.last_run()
    assert run.selection is not None
    assert run.n_k == 256 and run.density == pytest.approx(1 / Neighborhood.of((16, 16), 8, 8).flop_bound)


def test_query_tiles_are_stride_groups() -> None:
    assert query_tile(Neighborhood.of((16, 44, 80), (None, 12, 24), (1, 4, 8)), 64)[1:] == (4, 8)
    assert query_tile(Neighborhood.of((64, 64), 13), 64) == (8, 8)
    tile = query_tile(Neighborhood.of((32, 48, 80), (16, 24, 24), (16, 8, 8)), 64)
    assert math.prod(tile) <= 128 and all(s % t == 0 for s, t in zip((16, 8, 8), tile, strict=True))
    assert query_tile(Neighborhood.of((8, 32, 32), 4, 1, 1, (True, False, False)), 64) == (1, 8, 8)


def decoder_map(n: int, window: int, stride: int, dilation: int = 1) -> torch.Tensor:
    """The card's causal formula with an end that is not known."""
    i = torch.arange(n)
    own = i // dilation
    start = (own // stride * stride + stride - window).clamp(min=0)
    return (i % dilation == (i % dilation).unsqueeze(1)) & (own >= start.unsqueeze(1)) & (i <= i.unsqueeze(1))


@pytest.mark.parametrize("fields", [(32, 16, 1), (40, 5, 1), (300, 128, 1), (64, 64, 1), (12, 4, 3), (700, 300, 1)], ids=str)
@pytest.mark.parametrize("n_q", [333, 50])
def test_in_a_decoder(fields: tuple[int, int, int], n_q: int) -> None:
    window, stride, dilation = fields
    method = GNA(window=window, stride=stride, dilation=dilation)
    q, k, v = qkv(333)
    exact = masked_dense(q, k, v, decoder_map(333, *fields))[:, :, -n_q:]
    q = q[:, :, -n_q:]
    ctx = context(q, k, v)
    assert (method.attend(ctx, q, k, v) - exact).abs().max() < SAME
    assert torch.equal(method.select(ctx, q, k, v).dense_mask()[0, 0], decoder_map(333, *fields)[-n_q:])


def test_a_softcap_is_honoured() -> None:
    from dataclasses import replace

    q, k, v = (x * 3 for x in qkv(150))
    ctx = context(q, k, v)
    capped = replace(ctx, softcap=2.0, attend=lambda q, k, v, s: saccade.ops.attend(q, k, v, s, softcap=2.0).out)
    logits = 2.0 * torch.tanh((q @ k.repeat_interleave(2, 1).mT) * 8**-0.5 / 2.0)
    weights = logits.masked_fill(~decoder_map(150, 24, 3), -torch.inf).softmax(-1)
    got = GNA(window=24, stride=3).attend(capped, q, k, v)
    assert (got - weights @ v.repeat_interleave(2, 1)).abs().max() < SAME


def test_chunks_of_a_prompt_agree() -> None:
    q, k, v = qkv(300)
    method = build("gna(window=48, stride=16)")
    whole = method.attend(context(q, k, v), q, k, v)
    parts = []
    for begin, end in ((0, 130), (130, 171), (171, 300)):
        piece = q[:, :, begin:end], k[:, :, :end], v[:, :, :end]
        parts.append(method.attend(context(*piece), *piece))
    assert (torch.cat(parts, 2) - whole).abs().max() < SAME


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"grid": (8, 12), "window": 9}, "window of 9 with dilation 1 on an axis of 8"),
        ({"grid": (8, 12), "window": 4, "stride": 5}, "stride must be 1"),
        ({"grid": (8, 11), "window": 4}, "make 88 tokens"),
        ({"grid": (8, 12), "window": (4, 4, 4)}, "does not fit a grid of 2 axes"),
        ({"grid": (2, 2, 2, 12), "window": 2}, "grid of 4 axes"),
        ({"grid": (8, 12), "window": 4, "extra": -1}, "extra=-1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(*qkv(96), **sizes)
    with pytest.raises(ValueError, match="stride above the window"):
        build("gna(window=8, stride=9)")
    with pytest.raises(ValueError, match="not a whole number"):
        build("gna(window=0)")
