"""A static pattern made into what attention runs on: tile lists for one length, kept for the next call of that length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from saccade.core import KeyMajor, Selection
from saccade.core.tilemath import list_true
from saccade.parts.static.pattern import Pattern, Ranges

CELLS = 1 << 24  # tiles of the map, or pairs of single tiles, looked at in one go


@dataclass(frozen=True, eq=False)
class Compiled:
    """A pattern over n_q queries and n_k keys in tiles.

    selection: the tiles that hold a pair of the pattern, `(1, heads, ...)`. exact: it reads the pattern's pairs and no others;
    otherwise some tile is read whole though only a part of it belongs to the pattern.
    """

    pattern: Pattern
    selection: Selection
    exact: bool

    @cached_property
    def transpose(self) -> KeyMajor:
        """Which query tiles read each key tile."""
        return self.selection.transpose()

    @cached_property
    def density(self) -> float:
        """Score pairs computed / pairs visible."""
        return self.selection.density()


def compile_pattern(
    pattern: Pattern, n_q: int, n_k: int, *, block_q: int = 64, block_k: int = 64, causal: bool = True,
    device: torch.device | str = "cpu",
) -> Compiled:  # fmt: skip
    """The pattern's tiles for queries at the last n_q of n_k positions, found tile by tile: no n_q x n_k map is made.

    Results are shared between calls with equal arguments and must not be changed. Raises ValueError on sizes below 1 or n_q > n_k
    where causal.
    """
    if min(n_q, n_k, block_q, block_k) < 1 or (causal and n_q > n_k):
        raise ValueError(
            f"a pattern over {n_q} queries and {n_k} keys in tiles of {block_q} x {block_k}: sizes must be at least 1, "
            "and causal queries are among the keys"
        )
    return _compiled(pattern, n_q, n_k, block_q, block_k, causal, str(device))


@lru_cache(maxsize=64)
def _compiled(pattern: Pattern, n_q: int, n_k: int, block_q: int, block_k: int, causal: bool, device: str) -> Compiled:
    q_tiles, k_tiles, heads = math.ceil(n_q / block_q), math.ceil(n_k / block_k), pattern.heads
    first = torch.arange(q_tiles, device=device) * block_q
    q0, q1 = first + n_k - n_q, (first + block_q).clamp(max=n_q) + n_k - n_q
    k0 = torch.arange(k_tiles, device=device) * block_k
    k1 = (k0 + block_k).clamp(max=n_k)
    ids, counts, exact = [], [], True
    for rows in torch.arange(q_tiles, device=device).split(max(1, CELLS // (heads * k_tiles))):
        low, high = q0[rows].view(1, -1, 1), q1[rows].view(1, -1, 1)
        listed, whole = _tiles(pattern, Ranges(low, high, k0.view(1, 1, -1), k1.view(1, 1, -1), causal), heads)
        exact = exact and not bool((listed & ~whole).any())
        found, count = list_true(listed)
        ids.append(found)
        counts.append(count)
    longest = max(x.shape[-1] for x in ids)
    # list_true marks the end of a list with the number of tiles, which times block_k may lie below n_k
    padded = [torch.nn.functional.pad(x, (0, longest - x.shape[-1]), value=k_tiles) for x in ids]
    starts = torch.cat(padded, 1)
    starts = torch.where(starts < k_tiles, starts * block_k, n_k).to(torch.int32).unsqueeze(0)
    start_counts = torch.cat(counts, 1).unsqueeze(0)
    selection = Selection(
        n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=starts, start_counts=start_counts, tokens=starts[..., :0],
        token_counts=torch.zeros_like(start_counts), causal=causal,
    )  # fmt: skip
    return Compiled(pattern, selection, exact)


def _tiles(pattern: Pattern, at: Ranges, heads: int) -> tuple[Tensor, Tensor]:
    """Which tiles hold a pair, and which hold no visible pair outside the pattern: bool `(heads, Tq, Tk)` each."""
    shape = (heads, at.q0.shape[1], at.k0.shape[2])
    visible = torch.ones(shape, dtype=torch.bool, device=at.q0.device)
    if at.causal:
        visible = (at.k0 < at.q1).expand(shape)
        # keys after the newest row belong to no visible pair
        at = at._replace(k1=torch.minimum(at.k1, at.q1), k0=torch.minimum(at.k0, at.q1 - 1))
    bounds = pattern.tiles(at)
    some, surely, whole = (x.expand(shape) & visible for x in bounds)
    unsure = (some & ~surely).nonzero()
    if len(unsure):
        some = some.clone()
        size = int((at.q1 - at.q0).max()) * int((at.k1 - at.k0).max())
        for part in unsure.split(max(1, CELLS // (size * heads))):
            some[part.unbind(1)] = _holds_pair(pattern, at, part)
    return some, whole & some


def _holds_pair(pattern: Pattern, at: Ranges, tiles: Tensor) -> Tensor:
    """Whether each of the tiles `(m, 3)` (head, query tile, key tile) holds a visible pair: looks at every pair."""
    head, row, column = tiles.unbind(1)
    q0, q1 = at.q0[0, row, 0].view(-1, 1, 1), at.q1[0, row, 0].view(-1, 1, 1)
    k0, k1 = (x.expand(1, at.q0.shape[1], -1)[0, row, column].view(-1, 1, 1) for x in (at.k0, at.k1))
    q = q0 + torch.arange(int((q1 - q0).max()), device=q0.device).view(1, -1, 1)
    k = k0 + torch.arange(int((k1 - k0).max()), device=q0.device).view(1, 1, -1)
    pairs = pattern.allow(q.unsqueeze(0), k.unsqueeze(0))
    pairs = pairs.expand(max(pairs.shape[0], pattern.heads), *pairs.shape[1:])[head, torch.arange(len(head), device=head.device)]
    real = (q < q1) & (k < k1)
    if at.causal:
        real = real & (k <= q)
    return (pairs & real).flatten(1).any(1)
