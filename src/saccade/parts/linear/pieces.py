"""A call cut where the sequence's own segments end, however the tokens come."""

from __future__ import annotations

from itertools import pairwise


def pieces(start: int, n: int, size: int) -> list[tuple[int, int]]:
    """Ranges `(begin, end)` of the n tokens of a call behind `start` others, none of which crosses a multiple of `size` of the sequence."""
    cuts = [0, *range(size - start % size, n, size), n]
    return list(pairwise(cuts))
