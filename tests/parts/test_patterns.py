from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.core import Selection
from saccade.ops.estimate.reference_lists import compact, outside
from saccade.parts import patterns
from saccade.parts.choose import ranks
from saccade.parts.lists import KeyLists, best_listed, hits, join_heads, open_rows, run_tiles, tile_ends

SHAPES = [(200, 200, 16), (37, 200, 16), (150, 211, 16), (64, 64, 64), (9, 9, 16)]


def random_mask(*shape: int, share: float, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def checked(lists: KeyLists, n_q: int, n_k: int, block: int) -> Selection:
    """The Selection, after a look at what its constructor takes on trust: sorted, disjoint, no key named twice."""
    direct = lists.selection(n_q=n_q, n_k=n_k, block=block)
    lists, own = lists.own_lists(n_k), direct.own_lists()
    sorted_out = Selection.from_parts(
        n_q=n_q, n_k=n_k, block_q=block, block_k=block, starts=lists.starts, tokens=lists.tokens
    )
    assert torch.equal(direct.start_counts, sorted_out.start_counts)
    assert torch.equal(direct.token_counts, sorted_out.token_counts)
    for name in ("starts", "tokens"):
        given, again = getattr(own, name), getattr(sorted_out, name)
        assert given.dtype == torch.int32
        assert torch.equal(given[..., : again.shape[-1]], again)
        assert bool((given[..., again.shape[-1] :] == n_k).all())
    assert direct.aligned == sorted_out.aligned
    return direct


def rows_of(n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    """Position of each query `(n_q, 1)`, and of each key."""
    return torch.arange(n_k - n_q, n_k).unsqueeze(-1), torch.arange(n_k)


def tiled(mask: Tensor, n_q: int, block: int) -> Tensor:
    """What every row of a query tile reads, when each reads what any of them needs, and causality holds."""
    n_k = mask.shape[-1]
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -n_q % block))
    shared = padded.unflatten(-2, (-1, block)).any(-2).repeat_interleave(block, dim=-2)[..., :n_q, :]
    rows, keys = rows_of(n_q, n_k)
    return shared & (keys <= rows)


@pytest.mark.parametrize(("n_q", "n_k", "block"), SHAPES)
@pytest.mark.parametrize(("initial", "local"), [(1, 1), (5, 20), (16, 33), (40, 7), (300, 300)])
def test_a_shape(n_q: int, n_k: int, block: int, initial: int, local: int) -> None:
    lists = patterns.a_shape(torch.tensor([[initial]]), torch.tensor([[local]]), tile_ends(n_q, n_k, block), block, n_k)
    found = checked(lists, n_q, n_k, block).dense_mask()[0, 0]
    rows, keys = rows_of(n_q, n_k)
    exact = tiled(((keys < initial) | (rows - keys < local)) & (keys <= rows), n_q, block)
    assert torch.equal(found, exact)


def test_a_shape_of_each_head() -> None:
    lists = patterns.a_shape(torch.tensor([[3, 20]]), torch.tensor([[40, 5]]), tile_ends(100, 100, 16), 16, 100)
    together = checked(lists, 100, 100, 16).dense_mask()
    for head, (initial, local) in enumerate([(3, 40), (20, 5)]):
        alone = patterns.a_shape(torch.tensor([[initial]]), torch.tensor([[local]]), tile_ends(100, 100, 16), 16, 100)
        assert torch.equal(alone.selection(n_q=100, n_k=100, block=16).dense_mask()[0, 0], together[0, head])


@pytest.mark.parametrize(("n_q", "n_k", "block"), SHAPES)
@pytest.mark.parametrize("width", [1, 12, 50, 400])
def test_band_and_columns(n_q: int, n_k: int, block: int, width: int) -> None:
    columns = random_mask(2, 3, n_k, share=0.2)
    lists = patterns.band_and_columns(columns, width, tile_ends(n_q, n_k, block), block)
    found = checked(lists, n_q, n_k, block).dense_mask()
    rows, keys = rows_of(n_q, n_k)
    exact = ((rows - keys < width) | columns.unsqueeze(2)) & (keys <= rows)
    assert torch.equal(found, tiled(exact, n_q, block))
    # one list of columns, of which each tile reads those before its band
    assert lists.tokens.shape[:3] == (2, 3, 1) and lists.tokens.numel() <= columns.numel()


def test_one_list_of_columns_is_joined_and_opened_as_written_lists_are() -> None:
    ends = tile_ends(100, 120, 16)
    band = patterns.band_and_columns(random_mask(2, 2, 120, share=0.3), 20, ends, 16)
    other = patterns.vertical_slash(random_mask(2, 1, 120, share=0.2), random_mask(2, 1, 120, share=0.1), ends, 16)
    assert band.token_counts is not None and band.tokens.shape[-1]
    order = (torch.tensor([2, 0]), torch.tensor([1]))
    for last in (0, 1, 20, 100):
        opened = [checked(open_rows(lists, n_q=100, n_k=120, last=last, block=16), 100, 120, 16) for lists in (band, band.own_lists(120))]
        assert torch.equal(*(s.dense_mask() for s in opened)) and opened[0].one_list
    joined = [join_heads([(order[0], lists), (order[1], other)], 120) for lists in (band, band.own_lists(120))]
    assert torch.equal(*(checked(lists, 100, 120, 16).dense_mask() for lists in joined))


@pytest.mark.parametrize(("n_q", "n_k", "block"), SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_vertical_slash_lists_every_key_once(n_q: int, n_k: int, block: int, share: float) -> None:
    columns = random_mask(2, 3, n_k, share=share)
    offsets = random_mask(2, 3, n_k, share=share / 4, seed=1)
    selection = checked(patterns.vertical_slash(columns, offsets, tile_ends(n_q, n_k, block), block), n_q, n_k, block)
    found = selection.dense_mask()
    rows, keys = rows_of(n_q, n_k)
    on_diagonal = torch.gather(offsets, -1, (rows - keys).clamp(min=0).flatten().expand(2, 3, -1)).view(2, 3, n_q, n_k)
    wanted = (columns.unsqueeze(2) | on_diagonal) & (keys <= rows)
    assert not (wanted & ~found).any()  # every selected column and every (i, i - o)
    # and nothing but these, and what lies in a tile of a diagonal
    tiles = Selection.from_parts(n_q=n_q, n_k=n_k, block_q=block, block_k=block, starts=selection.starts).dense_mask()
    assert not (found & ~tiles & ~columns.unsqueeze(2)).any()
    # pairs are counted list by list, the mask key by key: they agree when nothing is listed twice
    assert torch.equal(selection.pairs(), found.sum((-1, -2)))


def test_blocks() -> None:
    chosen = random_mask(2, 3, 7, 13, share=0.4)
    selection = checked(patterns.blocks(chosen, 16, 201), 100, 201, 16)
    assert torch.equal(
        selection.dense_mask(), Selection.from_block_mask(chosen, block_q=16, block_k=16, n_q=100, n_k=201).dense_mask()
    )


def test_joined_heads_keep_their_places() -> None:
    ends = tile_ends(100, 100, 16)
    first = patterns.a_shape(torch.tensor([[3, 20]]), torch.tensor([[40, 5]]), ends, 16, 100)
    second = patterns.vertical_slash(random_mask(2, 1, 100, share=0.2), random_mask(2, 1, 100, share=0.1), ends, 16)
    joined = join_heads([(torch.tensor([2, 0]), first), (torch.tensor([1]), second)], 100)
    found = checked(joined, 100, 100, 16).dense_mask()
    for head, (lists, row) in enumerate([(first, 1), (second, 0), (first, 0)]):
        alone = lists.selection(n_q=100, n_k=100, block=16).expand(2, lists.starts.shape[1]).dense_mask()
        assert torch.equal(found[:, head], alone[:, row])


def test_opened_rows_read_everything() -> None:
    ends = tile_ends(100, 120, 16)
    lists = patterns.a_shape(torch.tensor([[3]]), torch.tensor([[10]]), ends, 16, 120)
    before = lists.selection(n_q=100, n_k=120, block=16).dense_mask()
    after = checked(open_rows(lists, n_q=100, n_k=120, last=20, block=16), 100, 120, 16).dense_mask()
    rows, keys = rows_of(100, 120)
    assert torch.equal(after[0, 0, 80:], (keys <= rows)[80:])
    assert torch.equal(after[:, :, :80], before[:, :, :80])


def test_run_tiles_cover_runs_from_the_left() -> None:
    starts = run_tiles(torch.tensor([0, 5, 40, 60]), torch.tensor([40, 6, 30, 70]), 16, 64)
    assert [[s for s in row if s < 64] for row in starts.tolist()] == [[0, 16, 32], [5], [], [60]]


def test_compact_and_outside() -> None:
    ids = torch.tensor([1, 4, 6, 9], dtype=torch.int32)
    keep = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert compact(ids, keep, 50).tolist() == [[1, 6, 9], [9, 50, 50]]
    tokens = torch.tensor([[[0, 3, 4, 7, 8, 30, 50]]], dtype=torch.int32)
    starts = torch.tensor([[[[4, 50], [8, 28]]]], dtype=torch.int32)
    found = outside(tokens, starts, torch.tensor([8, 40]), 4, 50)
    assert found.tolist() == [[[[0, 3, 50, 50], [0, 3, 4, 7]]]]


@pytest.mark.parametrize("counts", [[[5, 5, 5]], [[5, 0, 31]], [[0, 0, 0]], [[40, 3, 50], [1, 2, 40]]])
def test_the_best_are_listed_as_their_ranks_say(counts: list[list[int]]) -> None:
    """Few values, so that many tie; a nan is the best of all."""
    scores = torch.randint(0, 6, (2, 3, 40), generator=torch.Generator().manual_seed(1)).float()
    scores[0, 1, 7], scores[:, :, :2] = torch.nan, torch.inf
    wanted = ranks(scores) < torch.tensor(counts).unsqueeze(-1)
    found = best_listed(scores, torch.tensor(counts))
    assert found.dtype == torch.int32 and found.shape[-1] == min(40, max(max(row) for row in counts))
    for row, mask in zip(found.flatten(0, 1), wanted.flatten(0, 1), strict=True):
        assert row.tolist() == mask.nonzero().flatten().tolist() + [40] * int((row == 40).sum())


def test_hits_are_the_true_entries_row_by_row() -> None:
    mask = torch.tensor([[[True, False, True], [False, False, False]], [[False, True, True], [True, True, True]]])
    assert hits(mask).tolist() == [[[0, 2, 3], [3, 3, 3]], [[1, 2, 3], [0, 1, 2]]]
    assert hits(mask[:, :, :0]).shape == hits(torch.zeros(2, 2, 5, dtype=torch.bool)).shape == (2, 2, 0)
