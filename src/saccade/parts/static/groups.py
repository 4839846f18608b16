"""Attention inside groups of consecutive tokens, the groups of some heads shifted: dense calls on pieces of the sequence, no masks.

With groups of g tokens and a shift of s tokens, a head's borders are 0, s, s + g, s + 2g, ..., n. A query reads the keys of its own
group up to itself, and the first `sinks` keys. With `wrapped` the last group of a shifted head also reads the first s keys: that is
what rolling the sequence by s and masking by true positions gives. Every piece is causal dense attention over consecutive keys, or
over the first few keys and consecutive ones, so that it runs, forward and backward, in the fastest dense kernel there is.
Sources: longlora, arXiv 2309.12307, section 3.2; sinklora, arXiv 2406.05678, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import HeadLayout, LayerContext, Prefill, Selection
from saccade.parts.static.compiled import compile_pattern
from saccade.parts.static.decoder import check_sizes
from saccade.parts.static.pattern import Pattern, group, since, sink

Attend = Callable[[Tensor, Tensor, Tensor, None], Tensor]
TILE = 128  # longest tile of a Selection


class Piece(NamedTuple):
    """`count` groups of tokens begin ... begin + size - 1 and so on, each of which also reads the keys 0 ... prefix - 1."""

    begin: int
    size: int
    count: int
    prefix: int


@dataclass(frozen=True)
class Groups:
    """size: tokens a group. shifted: how many of the last query heads have shifted groups. sinks, wrapped: see above."""

    size: int
    shifted: int
    sinks: int = 0
    wrapped: bool = True

    @property
    def shift(self) -> int:
        """Tokens before the first border of a shifted head."""
        return self.size // 2

    def shifts(self, layout: HeadLayout) -> tuple[int, ...]:
        """The shift of every query head; one a key/value head or one for all where that says the same."""
        heads = layout.query_heads
        by_query = tuple(self.shift if h >= heads - self.shifted else 0 for h in range(heads))
        if len(set(by_query)) == 1:
            return by_query[:1]
        by_group = [by_query[i : i + layout.group] for i in range(0, heads, layout.group)]
        return tuple(x[0] for x in by_group) if all(len(set(x)) == 1 for x in by_group) else by_query

    def pattern(self, n: int, layout: HeadLayout) -> Pattern:
        """The keys that each head reads in a sequence of n tokens."""
        shifts = self.shifts(layout)
        found = group(self.size, tuple(self.size - s if s else 0 for s in shifts))
        if self.wrapped and any(shifts):
            found = found | (since(tuple(self.last_border(n, s) for s in shifts)) & sink(shifts))
        return found | sink(self.sinks) if self.sinks else found

    def last_border(self, n: int, shift: int) -> int:
        """Where the last group begins."""
        return shift + (n - 1 - shift) // self.size * self.size if n > shift else 0

    def select(self, n_q: int, n_k: int, layout: HeadLayout, device: torch.device) -> Selection:
        """The pattern as an exact Selection, in tiles that no border cuts."""
        common = math.gcd(self.size, n_k - n_q, self.sinks, self.shift if self.shifted else 0)
        tile = max(t for t in range(1, min(TILE, common) + 1) if common % t == 0)
        return compile_pattern(self.pattern(n_k, layout), n_q, n_k, block_q=tile, block_k=tile, device=device).selection

    def attend(self, q: Tensor, k: Tensor, v: Tensor, run: Attend) -> Tensor:
        """Attention of q `(B, Hq, n_q, D)`, the last n_q positions, over k, v `(B, Hk, n_k, ...)`. `run(q, k, v, None)` is causal dense
        attention, aligned at the end."""
        pieces = []
        for shift, query_heads, kv_heads in self._head_sets(HeadLayout.of(q, k, v)):
            rows = self._heads(q[:, query_heads], k[:, kv_heads], v[:, kv_heads], shift, run)
            if rows.shape[1] == q.shape[1]:
                return rows
            pieces.append((query_heads, rows))
        order = torch.tensor([h for heads, _ in pieces for h in heads], device=q.device)
        return torch.cat([rows for _, rows in pieces], 1).index_select(1, order.argsort())

    def _head_sets(self, layout: HeadLayout) -> list[tuple[int, list[int], list[int]]]:
        """(shift, query heads, their key/value heads): sets in which every key/value head serves equally many query heads."""
        sets: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        first_shifted = layout.query_heads - self.shifted
        for kv_head in range(layout.kv_heads):
            own = range(kv_head * layout.group, (kv_head + 1) * layout.group)
            for shift, heads in ((0, [h for h in own if h < first_shifted]), (self.shift, [h for h in own if h >= first_shifted])):
                if heads:
                    queries, keys = sets.setdefault((shift, len(heads)), ([], []))
                    queries += heads
                    keys.append(kv_head)
        return [(shift, queries, keys) for (shift, _), (queries, keys) in sets.items()]

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, shift: int, run: Attend) -> Tensor:
        first = k.shape[2] - q.shape[2]
        parts = []
        for piece in self.pieces(first, k.shape[2], shift):
            end = piece.begin + piece.size * piece.count
            rows = q[:, :, max(piece.begin, first) - first : end - first]
            keys, values = (_with_prefix(x[:, :, : piece.prefix], x[:, :, piece.begin : end], piece.count) for x in (k, v))
            out = run(_split(rows, piece.count), keys, values, None)
            parts.append(out.unflatten(0, (q.shape[0], piece.count)).transpose(1, 2).flatten(2, 3))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def pieces(self, first: int, n: int, shift: int) -> list[Piece]:
        """The groups that hold queries first ... n - 1; whole groups that are alike are joined."""
        borders = [*dict.fromkeys((0, *range(shift, n, self.size), n))] if n > shift else [0, n]
        found: list[Piece] = []
        for begin, end in pairwise(borders):
            if end <= first:
                continue
            head = max(self.sinks, shift) if self.wrapped and end == n else self.sinks
            piece = Piece(begin, end - begin, 1, min(begin, head))
            last = found[-1] if found else None
            if last is not None and last.begin >= first and (last.size, last.prefix) == (piece.size, piece.prefix):
                found[-1] = last._replace(count=last.count + 1)
            else:
                found.append(piece)
        return found


class GroupedPrefill(Prefill):
    """A prefill method that attends in groups while a model is trained, and leaves single tokens to dense attention.

    Its fields: groups, how many a sequence is cut into, or group, their tokens; shifted, the share of the query heads, the last ones, whose
    groups are shifted; wrapped and sinks as in `Groups`.
    """

    groups: int
    group: int | None
    shifted: float
    wrapped: bool
    sinks: int = 0

    def __post_init__(self) -> None:
        slug = self.info.slug
        check_sizes(slug, groups=self.groups, group=1 if self.group is None else self.group)
        if isinstance(self.shifted, bool) or not isinstance(self.shifted, int | float) or not 0 <= self.shifted <= 1:
            raise ValueError(f"{slug}(shifted={self.shifted!r}) is not a share of heads between 0 and 1")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"{slug}(sinks={self.sinks!r}) is not a whole number of at least 0")

    def cut(self, n: int, layout: HeadLayout) -> Groups:
        """The groups of a sequence of n tokens."""
        size = self.group or math.ceil(n / self.groups)
        return Groups(size, round(self.shifted * layout.query_heads), self.sinks, self.wrapped)

    def pattern(self, n: int, layout: HeadLayout) -> Pattern:
        """The keys that each head reads in a sequence of n tokens."""
        return self.cut(n, layout).pattern(n, layout)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        layout = HeadLayout.of(q, k, v)
        return self.cut(k.shape[2], layout).select(q.shape[2], k.shape[2], layout, q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1:
            return ctx.attend(q, k, v, None)
        return self.cut(k.shape[2], HeadLayout.of(q, k, v)).attend(q, k, v, ctx.attend)


# why what attends in groups opts out of parts of a sequence
IN_PARTS = {
    "chunked": "a group is a share of the whole sequence, of which a chunk knows what has come so far",
    "stepwise": "single tokens are decoded densely, as the tuned model attends; groups are for training on whole sequences",
}


def _split(x: Tensor, count: int) -> Tensor:
    """x `(B, H, count * m, D)` as `(B * count, H, m, D)`."""
    return x.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _with_prefix(prefix: Tensor, x: Tensor, count: int) -> Tensor:
    if not prefix.shape[2]:
        return _split(x, count)
    repeated = prefix.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(0, 1)
    return torch.cat([repeated, _split(x, count)], 2)
