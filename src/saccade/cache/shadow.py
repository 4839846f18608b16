"""A sealed segment whose keys are low-rank factors on the device and whose values lie on the host; some chunks are kept exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saccade.cache.offloaded import OffloadedSegment, OffloadedStore, RecentUnits
from saccade.cache.segment import Rectangle, Segment, attend_rectangle
from saccade.cache.stores import held, take
from saccade.core import Partial, Rotary, merge
from saccade.ops.decode import decode_low_rank
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows

_TENSORS = ("factors", "basis", "landmarks", "chunks", "exact_chunks", "exact_keys", "exact_values", "positions")


@dataclass(frozen=True, kw_only=True)
class ShadowContent:
    """n tokens in chunks of `chunk`, of which O a head are exact and L = n / chunk - O are found through landmarks.

    factors `(B, 1, n, r)` and basis `(B, Hk, r, D)`: keys before the rotary embedding, which turns token t to the place begin + t.
    values: of all n tokens. landmarks `(B, Hk, L, D)`: means of turned keys; chunks `(B, Hk, L)` int64: which chunks they stand for.
    exact_chunks `(B, Hk, O)` int64 with exact_keys `(B, Hk, O chunk, D)`, turned, and exact_values. positions `(B, 1, n)` int32.
    """

    factors: Tensor
    basis: Tensor
    values: OffloadedStore
    landmarks: Tensor
    chunks: Tensor
    exact_chunks: Tensor
    exact_keys: Tensor
    exact_values: Tensor
    positions: Tensor
    chunk: int
    begin: int
    rotary: Rotary | None


class ShadowSegment(Segment):
    """All entries can be read; `attend_chosen` reads the exact chunks and some others."""

    encoded = True

    def __init__(self, content: ShadowContent) -> None:
        self.content = content

    @property
    def length(self) -> int:
        return self.content.factors.shape[2]

    def lengths(self) -> list[list[int]]:
        batch, heads = self.content.basis.shape[:2]
        return [[self.length] * heads for _ in range(batch)]

    @property
    def kv_bytes(self) -> int:
        c = self.content
        return held(c.factors, c.basis, c.exact_keys, c.exact_values)

    @property
    def side_bytes(self) -> int:
        c = self.content
        return held(c.landmarks, c.chunks, c.exact_chunks, c.positions)

    @property
    def host_bytes(self) -> int:
        return self.content.values.host_bytes

    def tokens(self, chunks: Tensor) -> Tensor:
        """The tokens of chunks `(B, Hk, m)`, `(B, Hk, m chunk)`."""
        inside = torch.arange(self.content.chunk, device=chunks.device)
        return (chunks.unsqueeze(-1) * self.content.chunk + inside).flatten(-2)

    def read(self, begin: int, end: int) -> Rectangle:
        c = self.content
        exact = torch.promote_types(c.factors.dtype, torch.float32)
        keys = (c.factors[:, :, begin:end].to(exact) @ c.basis.to(exact)).to(c.factors.dtype)
        if c.rotary is not None:
            keys = turn(keys, torch.arange(c.begin + begin, c.begin + end, device=keys.device), c.rotary)
        # the exact chunks take their places; those of other spans go to a spare slot
        places = self.tokens(c.exact_chunks)
        places = torch.where((places >= begin) & (places < end), places - begin, end - begin)
        keys = torch.nn.functional.pad(keys, (0, 0, 0, 1)).scatter(2, places.unsqueeze(-1).expand_as(c.exact_keys), c.exact_keys)
        side = {"positions": c.positions[:, :, begin:end].expand(*keys.shape[:2], -1)}
        return Rectangle(keys[:, :, :-1], c.values.read(begin, end), side)

    def attend_chosen(self, q: Tensor, picked: Tensor, recent: RecentUnits, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, 1, D)` over the exact chunks and those of the landmarks `picked (B, Hk, m)` int64.

        Values that `recent` does not hold are fetched while keys are rebuilt and the exact chunks are read.
        """
        c = self.content
        chunks = c.chunks.gather(-1, picked)

        def load(rows: Tensor, heads: Tensor, ids: Tensor) -> Callable[[], list[Tensor]]:
            values = c.values.pick_runs(rows, heads, ids * c.chunk, c.chunk)
            return lambda: [values.result()]

        fetched = recent.begin(chunks, load)
        tokens = self.tokens(chunks)
        factors = pick_rows(c.factors, tokens.flatten(1).unsqueeze(1)).unflatten(2, tokens.shape[1:]).squeeze(1)
        parts = [] if not c.exact_chunks.shape[-1] else [attend_rectangle(q, c.exact_keys, c.exact_values, scale=scale, softcap=softcap)]
        values = fetched()[0].flatten(2, 3)
        rows = []
        for b in range(q.shape[0]):
            mine = slice(b, b + 1)
            turning = {} if c.rotary is None else _turning(c, chunks[mine], tokens[mine])
            rows.append(decode_low_rank(
                q[mine], factors[mine], c.basis[b], values[mine], scale=scale, softcap=softcap, return_lse=True, **turning
            ))  # fmt: skip
        lse = torch.cat([row.lse for row in rows if row.lse is not None])
        return merge(*parts, Partial(torch.cat([row.out for row in rows]), lse))

    def take_rows(self, rows: Tensor) -> ShadowSegment:
        c = self.content
        return ShadowSegment(replace(c, values=c.values.take_rows(rows), **{name: take(getattr(c, name), rows) for name in _TENSORS}))

    def bound_to(self, row: int) -> ShadowSegment:
        """Shares its storage with this segment: sealed entries never change."""
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> Segment:
        """A chunk that loses tokens is no chunk: what is left is kept as plain entries on the host."""
        left = int((self.content.positions < position).sum(-1).max())
        if left == self.length:
            return self
        part = self.read(0, left) if left else self.read(0, 1)
        new: Segment = OffloadedSegment.of(part.keys, part.values, part.side, begin=self.content.begin)
        new = new.before(position) if not left else new
        new.row = self.row
        return new


def _turning(c: ShadowContent, chunks: Tensor, tokens: Tensor) -> dict[str, Any]:
    """How `decode_low_rank` turns the keys of these chunks `(B, Hk, m)`, whose tokens are `(B, Hk, m chunk)`.

    Its kernel works angles out on its own. On a CPU sines cost more than the keys they turn: there the angles of a chunk's first token
    and of a place inside a chunk are added, so that few sines are needed.
    """
    assert c.rotary is not None
    if tokens.is_cuda or c.rotary.interleaved:  # tables are those of channels i and i + pairs
        return {"rotary": c.rotary, "positions": tokens + c.begin}
    steps = c.rotary.inv_freq.double()
    first = (chunks * c.chunk + c.begin).double().unsqueeze(-1) * steps
    inside = torch.arange(c.chunk, dtype=torch.float64).unsqueeze(-1) * steps
    exact = torch.promote_types(c.factors.dtype, torch.float32)
    (cos_a, sin_a), (cos_j, sin_j) = ((x.cos().to(exact), x.sin().to(exact)) for x in (first.unsqueeze(-2), inside))
    cos, sin = cos_a * cos_j - sin_a * sin_j, sin_a * cos_j + cos_a * sin_j
    return {"rotary": (cos.flatten(2, 3), sin.flatten(2, 3))}
