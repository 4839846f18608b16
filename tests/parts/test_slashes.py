from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saccade.core import Selection
from saccade.ops.estimate.reference_lists import slash_tiles
from saccade.parts.lists import tile_ends


def by_hand(offsets: list[int], end: int, block: int, n_k: int) -> list[int]:
    """Offset by offset in descending order, as the paper's conversion walks, for the query tile that ends at `end`."""
    starts: list[int] = []
    covered = -1
    for offset in sorted(offsets, reverse=True):
        if offset >= end:
            continue
        begin = max(end - offset, block) - block
        if begin > covered:
            starts.append(begin)
            covered = begin + block
        elif begin + block > covered:
            starts.append(covered)
            covered += block
    return [start for start in starts if start < n_k]


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, list[int]]:
    n_k = draw(st.integers(1, 90))
    n_q = draw(st.integers(1, n_k))
    block = draw(st.sampled_from([1, 4, 16]))
    return n_q, n_k, block, sorted(draw(st.sets(st.integers(0, n_k - 1), max_size=25)))


@settings(max_examples=150, deadline=None)
@given(cases())
@example((90, 90, 16, [0, 15, 16, 17, 33, 89]))
@example((40, 40, 16, []))
@example((5, 90, 16, [0, 3, 80]))
def test_tiles_are_those_of_the_walk_and_cover_every_diagonal(case: tuple[int, int, int, list[int]]) -> None:
    n_q, n_k, block, offsets = case
    chosen = torch.zeros(1, 1, n_k, dtype=torch.bool)
    chosen[..., offsets] = True
    ends = tile_ends(n_q, n_k, block)
    starts = slash_tiles(chosen, ends, block)
    assert starts.dtype == torch.int32
    for tile, end in enumerate(ends.tolist()):
        assert [s for s in starts[0, 0, tile].tolist() if s < n_k] == by_hand(offsets, end, block, n_k)
    # from_parts refuses tiles that overlap, so nothing is covered twice
    mask = Selection.from_parts(n_q=n_q, n_k=n_k, block_q=block, block_k=block, starts=starts).dense_mask()[0, 0]
    for row in range(n_q):
        position = n_k - n_q + row
        missing = [o for o in offsets if o <= position and not mask[row, position - o]]
        assert not missing, f"query {position} misses the keys at offsets {missing}"


def test_heads_are_walked_apart() -> None:
    chosen = torch.zeros(1, 2, 64, dtype=torch.bool)
    chosen[0, 0, 0] = chosen[0, 1, 40] = True
    starts = slash_tiles(chosen, tile_ends(64, 64, 16), 16)
    assert [[s for s in row if s < 64] for row in starts[0, 0].tolist()] == [[0], [16], [32], [48]]
    assert [[s for s in row if s < 64] for row in starts[0, 1].tolist()] == [[], [], [0], [8]]


def test_steps_follow_the_tiles_not_the_offsets() -> None:
    """All offsets of a long prompt: as many steps as there are tiles in a row."""
    starts = slash_tiles(torch.ones(1, 1, 1024, dtype=torch.bool), tile_ends(1024, 1024, 64), 64)
    assert starts.shape[-1] == 16
