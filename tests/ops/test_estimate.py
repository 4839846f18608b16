"""estimate: the reference against dense attention, what choosing means, and what is refused. CPU, float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import Mass, Selection, Threshold
from saccade.ops import estimate
from saccade.ops.estimate import TileGrid, choose_threshold, choose_tiles, choose_top_k, choose_top_p

SHAPES = [(4, 2, 40, 40, 16, 8), (3, 1, 21, 50, 8, 16), (2, 2, 1, 33, 16, 4), (2, 2, 1, 1, 4, 4), (6, 2, 30, 30, 7, 5)]


def tensors(heads: int, kv_heads: int, n_q: int, n_k: int, dim: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, n_q, dim, generator=g, dtype=torch.float64)
    return q, torch.randn(2, kv_heads, n_k, dim, generator=g, dtype=torch.float64) + 0.3


def dense(q: torch.Tensor, k: torch.Tensor, causal: bool = True, softcap: float | None = None) -> torch.Tensor:
    """Logits of every pair, -inf where not visible."""
    z = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[-1] ** -0.5
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    n_q, n_k = q.shape[2], k.shape[2]
    hidden = torch.arange(n_k) > torch.arange(n_q).unsqueeze(-1) + n_k - n_q
    return z.masked_fill(hidden, -torch.inf) if causal else z


def by_tile(x: torch.Tensor, block_q: int, block_k: int, how: str, fill: float) -> torch.Tensor:
    """A map reduced over its tiles, one slice at a time."""
    rows = [
        [getattr(x[..., i : i + block_q, j : j + block_k], how)(dim=(-1, -2)) for j in range(0, x.shape[-1], block_k)]
        for i in range(0, x.shape[-2], block_q)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


# -- scores ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads", "n_q", "n_k", "block_q", "block_k"), SHAPES)
def test_pooled_scores_are_means_of_the_score_map(heads: int, kv_heads: int, n_q: int, n_k: int, block_q: int, block_k: int) -> None:
    q, k = tensors(heads, kv_heads, n_q, n_k)
    got = estimate.pooled_scores(q, k, block_q, block_k, causal=False)
    # the product of two means is the mean of the products
    torch.testing.assert_close(got, by_tile(dense(q, k, causal=False), block_q, block_k, "mean", 0.0))
    causal = estimate.pooled_scores(q, k, block_q, block_k)
    visible = by_tile(dense(q, k), block_q, block_k, "amax", -torch.inf) > -torch.inf
    torch.testing.assert_close(causal, got.masked_fill(~visible, -torch.inf))
    assert torch.equal(TileGrid.of(q, k, block_q, block_k).visible(), visible[0, 0])
    group = got.unflatten(1, (kv_heads, -1))
    torch.testing.assert_close(estimate.pooled_scores(q, k, block_q, block_k, causal=False, heads="max"), group.amax(2))
    torch.testing.assert_close(estimate.pooled_scores(q, k, block_q, block_k, causal=False, heads="mean"), group.mean(2))


def test_pool_blocks_keeps_to_the_tokens_there_are() -> None:
    x = torch.arange(10.0).view(1, 1, 10, 1) - 100
    assert estimate.pool_blocks(x, 4).flatten().tolist() == [-98.5, -94.5, -91.5]
    assert estimate.pool_blocks(x, 4, "max").flatten().tolist() == [-97, -93, -91]
    assert estimate.pool_blocks(-x, 4, "min").flatten().tolist() == [97, 93, 91]
    assert estimate.pool_blocks(x.half(), 4, "max").dtype == torch.half


def test_self_similarity_is_the_mean_of_all_cosines() -> None:
    x, _ = tensors(3, 3, 22, 22)
    shift = x.mean(2)
    got = estimate.block_statistics(x, 8, shift=shift)
    for t, begin in enumerate(range(0, 22, 8)):
        rows = torch.nn.functional.normalize(x[:, :, begin : begin + 8] - shift.unsqueeze(2), dim=-1)
        torch.testing.assert_close(got.similarity[..., t], (rows @ rows.mT).mean((-1, -2)))
    torch.testing.assert_close(got.mean, estimate.pool_blocks(x, 8) - shift.unsqueeze(2))
    same = torch.ones(1, 1, 16, 4).double()
    torch.testing.assert_close(estimate.self_similarity(same, 8), torch.ones(1, 1, 2).double())
    # a row of zeros has no direction: it is like no other, and gives no nan
    same[:, :, 0] = 0
    torch.testing.assert_close(estimate.self_similarity(same, 8)[0, 0], torch.tensor([49 / 64, 1.0]).double())


def test_an_outlier_key_lowers_the_similarity_of_its_block() -> None:
    k = -torch.ones(1, 1, 128, 8).double()
    k[:, :, 70] = 40.0
    similarity = estimate.self_similarity(k, 64)[0, 0]
    assert similarity[0] == pytest.approx(1) and similarity[1] < 0.95
    # the pooled score puts the block below what it holds
    q = torch.ones(1, 1, 1, 8).double()
    assert estimate.pooled_scores(q, k, 1, 64, scale=1.0)[0, 0, 0, 1] < 0 < (q @ k.mT).max()


@pytest.mark.parametrize("page", [1, 4, 16])
def test_page_bounds_are_above_every_product_of_the_page(page: int) -> None:
    q, k = tensors(4, 2, 9, 37)
    low, high = estimate.minmax_pages(k, page)
    raw = dense(q, k, causal=False) * q.shape[-1] ** 0.5
    best = by_tile(raw, 1, page, "amax", -torch.inf)
    got = estimate.page_bounds(q, low, high)
    assert (got >= best - 1e-12).all()
    if page == 1:
        torch.testing.assert_close(got, best)
    signs = (q.unsqueeze(3).sign() * k.repeat_interleave(2, dim=1).unsqueeze(2)) * q.unsqueeze(3).abs()
    wanted = torch.stack([part.amax(3).sum(-1) for part in signs.split(page, dim=3)], -1)
    torch.testing.assert_close(got, wanted)
    grid = TileGrid.of(q, k, 4, page)
    tiles = torch.stack([part.amax(2) for part in got.split(4, dim=2)], 2).masked_fill(~grid.visible(), -torch.inf)
    torch.testing.assert_close(estimate.page_bounds(q, low, high, grid), tiles)


def test_pages_that_grow_equal_pages_made_at_once() -> None:
    _, k = tensors(2, 2, 1, 50)
    low, high = (torch.full((2, 2, 13, 12), torch.nan, dtype=torch.float64) for _ in range(2))
    seen = 0
    for step in (3, 1, 1, 9, 16, 20):
        estimate.extend_pages(low, high, k[:, :, seen : seen + step], seen, 4)
        seen += step
    whole = estimate.minmax_pages(k, 4)
    assert torch.equal(low, whole[0]) and torch.equal(high, whole[1])
    with pytest.raises(ValueError, match="do not fit 13 pages of 4"):
        estimate.extend_pages(low, high, k, 50, 4)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads", "n_q", "n_k", "block_q", "block_k"), SHAPES)
def test_tile_maxima(heads: int, kv_heads: int, n_q: int, n_k: int, block_q: int, block_k: int, softcap: float | None) -> None:
    q, k = tensors(heads, kv_heads, n_q, n_k)
    base = torch.randn(q.shape[:3], dtype=torch.float64)
    for causal in (True, False):
        z = dense(q, k, causal, softcap)
        got = estimate.tile_maxima(q, k, block_q, block_k, causal=causal, softcap=softcap)
        torch.testing.assert_close(got, by_tile(z, block_q, block_k, "amax", 0.0))
        got = estimate.tile_maxima(q, k, block_q, block_k, causal=causal, softcap=softcap, relative_to=base)
        torch.testing.assert_close(got, by_tile(z - base.unsqueeze(-1), block_q, block_k, "amax", 0.0))


def test_four_bits_estimate_logits_and_smoothing_survives_outlier_channels() -> None:
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 1, 64, 64, generator=g) for _ in range(2))

    def error(q: torch.Tensor, k: torch.Tensor, **how: object) -> float:
        want = estimate.tile_maxima(q.double(), k.double(), 1, 1, causal=False)
        got = estimate.tile_maxima(q, k, 1, 1, causal=False, **how)
        return float((got - want).norm() / want.norm())

    toward = torch.randn(64, generator=g)
    q, k = q + toward, k + toward
    assert error(q, k, bits=4) < 0.1 and error(q, k, bits=8) < 0.01 and error(q, k) < 1e-6
    # steps shared by a block are coarser
    assert error(q, k, bits=4) < error(q, k, bits=4, group=32) < 0.2
    q, k = torch.randn(1, 1, 64, 64, generator=g), torch.randn(1, 1, 64, 64, generator=g)
    k[..., 5] += 20
    q[..., 9] += 15
    smooth, rough = error(q, k, bits=4), error(q, k, bits=4, smooth=False)
    assert smooth < 0.1 and rough > 2 * smooth


@pytest.mark.parametrize(("heads", "kv_heads", "n_q", "n_k", "block_q", "block_k"), SHAPES)
def test_pooled_probabilities_are_tile_sums_of_the_softmax(
    heads: int, kv_heads: int, n_q: int, n_k: int, block_q: int, block_k: int
) -> None:
    q, k = tensors(heads, kv_heads, n_q, n_k)
    for causal, softcap in ((True, None), (False, 1.5)):
        p = dense(q, k, causal, softcap).softmax(-1)
        got = estimate.pooled_probabilities(q, k, block_q, block_k, causal=causal, softcap=softcap)
        torch.testing.assert_close(got, by_tile(p, block_q, block_k, "sum", 0.0))
        means = estimate.mean_probability(got, n_q, block_q)
        torch.testing.assert_close(means.sum(-1), torch.ones_like(means[..., 0]))
        got = estimate.pooled_probabilities(q, k, block_q, block_k, causal=causal, softcap=softcap, reduce="max")
        torch.testing.assert_close(got, by_tile(p, block_q, block_k, "amax", 0.0))


@pytest.mark.parametrize("n_q", [40, 19])
def test_strided_probabilities_keep_their_positions(n_q: int) -> None:
    q, k = tensors(2, 1, n_q, 40)
    z = dense(q, k)[:, :, ::4, ::4]
    got = estimate.pooled_probabilities(q, k, 8, 16, stride=4, reduce="max")
    torch.testing.assert_close(got, by_tile(z.softmax(-1), 2, 4, "amax", 0.0))


def test_rows_that_see_no_key() -> None:
    q, k = tensors(2, 2, 12, 8)
    sums = estimate.pooled_probabilities(q, k, 4, 4)
    torch.testing.assert_close(sums.sum((-1, -2)), torch.full((2, 2), 8.0).double())
    assert (sums[:, :, 0] == 0).all()
    assert (estimate.tile_maxima(q, k, 4, 4)[:, :, 0] == -torch.inf).all()
    found = estimate.row_sums(q, k, diagonals=True)
    assert (found.lse[..., :4] == -torch.inf).all() and torch.isfinite(found.lse[..., 4:]).all()
    assert found.columns.sum() == pytest.approx(2 * 2 * 8)


@pytest.mark.parametrize(("heads", "kv_heads", "m", "n"), [(4, 2, 8, 50), (2, 2, 70, 90), (3, 1, 1, 1), (2, 1, 30, 30)])
def test_row_sums_against_the_rows(heads: int, kv_heads: int, m: int, n: int) -> None:
    q, k = tensors(heads, kv_heads, m, n)
    p = dense(q, k).softmax(-1)
    found = estimate.row_sums(q, k, diagonals=True)
    torch.testing.assert_close(found.columns, p.sum(2))
    torch.testing.assert_close(found.lse, dense(q, k).logsumexp(-1))
    assert found.diagonals is not None
    for o in range(n):
        wanted = sum((p[:, :, i, n - m + i - o] for i in range(m) if n - m + i - o >= 0), torch.zeros(2, heads).double())
        torch.testing.assert_close(found.diagonals[..., o], wanted)
    # any rows, in any order
    order = torch.randperm(m)[: max(1, m // 2)]
    some = estimate.row_sums(q[:, :, order], k, order + n - m)
    torch.testing.assert_close(some.columns, p[:, :, order].sum(2))
    assert some.diagonals is None
    torch.testing.assert_close(estimate.row_sums(q, k, causal=False).columns, dense(q, k, False).softmax(-1).sum(2))


# -- choosing --------------------------------------------------------------------------------------------------------------


def tiles_of(selection: Selection) -> list[list[list[list[int]]]]:
    starts, counts = selection.starts.tolist(), selection.start_counts.tolist()
    return [
        [[[s // selection.block_k for s in starts[b][h][t][:n]] for t, n in enumerate(counts[b][h])] for h in range(len(counts[b]))]
        for b in range(len(counts))
    ]


def naive(row: list[float], rule: str, limit: float, visible: list[bool], must: list[bool], inside: bool) -> set[int]:
    """One row of tiles, chosen by going through them."""
    forced = {c for c, there in enumerate(visible) if there and (must[c] or math.isnan(row[c]))}
    open_ = [c for c, there in enumerate(visible) if there and row[c] > -math.inf and not (inside and c in forced)]
    best = sorted(open_, key=lambda c: (-row[c], c))
    if rule == "threshold":
        return forced | {c for c in best if row[c] > limit}
    taken = forced if inside else set()
    if rule == "count":
        return forced | set(best[: max(0, int(limit) - len(taken))])
    if limit >= 1:
        return forced | set(best)
    held = math.fsum(max(row[c], 0.0) for c in taken if not math.isnan(row[c]))
    total = held + math.fsum(max(row[c], 0.0) for c in best)
    chosen: set[int] = set()
    for c in best:
        if held >= limit * total and (chosen or taken):
            break
        chosen.add(c)
        held += max(row[c], 0.0)
    return forced | chosen


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, TileGrid, dict[str, object], str, object]:
    grid = TileGrid(
        n_q=draw(st.integers(1, 20)), n_k=draw(st.integers(1, 30)), block_q=draw(st.sampled_from([1, 4, 5])),
        block_k=draw(st.sampled_from([1, 3, 8])), causal=draw(st.booleans()),
    )  # fmt: skip
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    # few values: many ties; dyadic, so that sums are exact
    scores = torch.randint(0, 5, (2, 2, grid.rows, grid.columns), generator=g).double() / 4
    rule = draw(st.sampled_from(["count", "mass", "threshold"]))
    if rule != "mass":
        scores = scores - 0.5
    special = torch.rand(scores.shape, generator=g)
    scores = torch.where(special < 0.1, -torch.inf, scores)
    if draw(st.booleans()):
        scores = torch.where(special > 0.95, torch.nan, scores)
    options: dict[str, object] = {"sinks": draw(st.sampled_from([0, 1, 9])), "local": draw(st.sampled_from([0, 1, 7]))}
    if draw(st.booleans()):
        options["forced"] = torch.rand(2, 1, grid.rows, grid.columns, generator=g) < 0.2
    if rule != "threshold":
        options["inside"] = draw(st.booleans())
    limit: object = {"count": draw(st.integers(0, 8)), "mass": draw(st.sampled_from([0.25, 0.5, 0.75, 1.0])), "threshold": 0.25}[rule]
    if draw(st.booleans()):
        dtype = torch.int64 if rule == "count" else torch.float64
        limit = torch.full((2, 1, grid.rows), limit, dtype=dtype)
    return scores, grid, options, rule, limit


CHOOSE = {"count": choose_top_k, "mass": choose_top_p, "threshold": choose_threshold}


@settings(max_examples=200, deadline=None)
@given(choices())
def test_choosing_equals_going_through_the_tiles(problem: tuple[torch.Tensor, TileGrid, dict[str, object], str, object]) -> None:
    scores, grid, options, rule, limit = problem
    got = CHOOSE[rule](scores, limit, grid, **options)
    visible = [[bool(v) for v in row] for row in grid.visible()]
    must = grid.forced(int(options["sinks"]), int(options["local"])).expand(scores.shape)
    must = must | options.get("forced", torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    number = float(limit.flatten()[0]) if isinstance(limit, torch.Tensor) else float(limit)
    nan_free = not bool(scores.isnan().any())
    for b, heads in enumerate(tiles_of(got)):
        for h, rows in enumerate(heads):
            for t, found in enumerate(rows):
                inside = bool(options.get("inside", True))
                wanted = naive(scores[b, h, t].tolist(), rule, number, visible[t], must[b, h, t].tolist(), inside)
                if nan_free or len(wanted) <= got.starts.shape[-1]:
                    assert found == sorted(wanted)
    # what the class promises of its lists
    assert got.starts.dtype == torch.int32 and got.aligned and got.tokens.shape[-1] == 0
    past = torch.arange(got.starts.shape[-1]) >= got.start_counts.unsqueeze(-1)
    assert bool((got.starts[past] == grid.n_k).all()) and bool((got.starts[~past] < grid.n_k).all())


def test_ties_go_to_the_lower_index_and_the_crossing_tile_is_kept() -> None:
    grid = TileGrid(n_q=1, n_k=6, block_q=1, block_k=1)
    flat = torch.ones(1, 1, 1, 6)
    assert tiles_of(choose_top_k(flat, 3, grid)) == [[[[0, 1, 2]]]]
    assert tiles_of(choose_top_p(flat, 0.5, grid)) == [[[[0, 1, 2]]]]
    assert tiles_of(choose_top_p(flat, 0.51, grid)) == [[[[0, 1, 2, 3]]]]
    assert tiles_of(choose_top_p(torch.zeros(1, 1, 1, 6), 0.5, grid)) == [[[[0]]]]
    weights = torch.tensor([0.1, 0.5, 0.0, 0.2, 0.2, 0.0]).view(1, 1, 1, 6)
    assert tiles_of(choose_top_p(weights, 0.6, grid)) == [[[[1, 3]]]]
    assert tiles_of(choose_top_p(weights, 1.0, grid)) == [[[[0, 1, 2, 3, 4, 5]]]]
    # forced tiles count towards the share, or come on top
    assert tiles_of(choose_top_p(weights, 0.55, grid, sinks=1)) == [[[[0, 1]]]]
    assert tiles_of(choose_top_p(weights, 0.55, grid, sinks=1, inside=False)) == [[[[0, 1, 3]]]]
    assert tiles_of(choose_top_k(weights, 2, grid, local=1)) == [[[[1, 5]]]]
    assert tiles_of(choose_top_k(weights, 2, grid, local=1, inside=False)) == [[[[1, 3, 5]]]]
    assert tiles_of(choose_threshold(weights, 0.2, grid)) == [[[[1]]]]


def test_a_width_keeps_forced_tiles_and_then_the_best() -> None:
    grid = TileGrid(n_q=1, n_k=6, block_q=1, block_k=1)
    scores = torch.tensor([0.0, 3.0, 1.0, 2.0, 5.0, 0.5]).view(1, 1, 1, 6)
    forced = torch.tensor([False, False, True, True, False, False])
    got = choose_threshold(scores, -1.0, grid, local=1, forced=forced, max_tiles=4)
    assert got.starts.shape[-1] == 4 and tiles_of(got) == [[[[2, 3, 4, 5]]]]
    assert tiles_of(choose_threshold(scores, -1.0, grid, local=1, forced=forced, max_tiles=2)) == [[[[2, 5]]]]
    # a fixed count needs no wider lists than it can fill
    assert choose_top_k(scores, 2, grid).starts.shape[-1] == 2
    with pytest.raises(ValueError, match="max_tiles=1 is less than the 2 tiles"):
        choose_top_k(scores, 2, grid, sinks=1, local=1, max_tiles=1)


def test_budgets_and_shares() -> None:
    grid = TileGrid(n_q=8, n_k=8, block_q=2, block_k=2)
    scores = torch.arange(4.0).expand(1, 1, 4, 4)
    assert tiles_of(choose_top_k(scores, 0.5, grid)) == [[[[0], [1], [1, 2], [2, 3]]]]
    assert tiles_of(choose_tiles(scores, 0.5, grid)) == tiles_of(choose_top_k(scores, 0.5, grid))
    assert tiles_of(choose_tiles(scores, 3, grid)) == tiles_of(choose_top_k(scores, 2, grid))
    assert tiles_of(choose_tiles(scores, Threshold(1.5), grid)) == [[[[], [], [2], [2, 3]]]]
    assert tiles_of(choose_tiles(scores, Mass(0.6), grid)) == tiles_of(choose_top_p(scores, 0.6, grid))
    # fully open is every visible tile
    full = Selection.full(8, 8, block_q=2, block_k=2)
    for open_ in (choose_top_k(scores, 1.0, grid), choose_top_p(scores, 1.0, grid), choose_threshold(scores, -1.0, grid)):
        assert torch.equal(open_.dense_mask(), full.dense_mask()) and open_.density() == 1.0


def test_forced_tiles_are_those_of_with_forced() -> None:
    for n_q, n_k, block_q, block_k in ((20, 20, 4, 4), (7, 30, 4, 8), (10, 23, 16, 3)):
        grid = TileGrid(n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k)
        scores = torch.zeros(1, 1, grid.rows, grid.columns)
        for sinks, local in ((0, 1), (5, 0), (3, 6)):
            got = choose_top_k(scores, 0, grid, sinks=sinks, local=local)
            tokens = choose_top_k(scores, 0, grid).with_forced(sinks=sinks, local=local).coverage()
            tiles = torch.nn.functional.pad(tokens, (0, -n_k % block_k)).unflatten(-1, (grid.columns, block_k)).any(-1)
            wanted = Selection.from_block_mask(tiles, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k)
            assert tiles_of(got) == tiles_of(wanted)
            assert int(got.start_counts.max()) <= grid.most_forced(sinks, local)


# -- what is refused -------------------------------------------------------------------------------------------------------
