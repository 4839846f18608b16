"""What sealed segments have in common whose rows and heads all hold equally many entries, encoded together."""

from __future__ import annotations

import copy
from typing import Self

from torch import Tensor

from saccade.cache.parted import Part, PartedSegment, shared
from saccade.cache.segment import Segment
from saccade.cache.stores import PlainStore, held


class UniformSegment(Segment):
    """The first n entries of an encoded rectangle of `batch` rows and `heads` heads; positions `(batch, heads or 1, n or more)` int32."""

    encoded = True

    def __init__(self, positions: Tensor, heads: int) -> None:
        self.positions = shared(positions)
        self.heads = heads
        self.n = positions.shape[2]

    @property
    def batch(self) -> int:
        return self.positions.shape[0]

    @property
    def length(self) -> int:
        return self.n

    def lengths(self) -> list[list[int]]:
        return [[self.n] * self.heads for _ in range(self.batch)]

    @property
    def side_bytes(self) -> int:
        return held(self.positions)

    def span(self, begin: int, end: int) -> Tensor:
        """Positions of slots begin ... end - 1 in every head; ValueError for a range outside."""
        if not 0 <= begin < end <= self.n:
            raise ValueError(f"slots {begin} to {end} are not a range inside a segment of {self.n}")
        return self.positions[:, :, begin:end].expand(-1, self.heads, -1)

    def bound_to(self, row: int) -> Self:
        """Shares its storage with this segment: sealed entries never change."""
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> Segment:
        """Nothing is encoded again and no storage is freed; where rows or heads lose unequally, what is left becomes plain entries."""
        left = (self.positions[:, :, : self.n] < position).sum(-1)
        count = int(left.max()) if left.numel() else 0
        if bool((left == count).all()):
            new = copy.copy(self)
            new.n = count
            return new
        part = self.read(0, count)
        plain = PartedSegment([Part(
            keys=PlainStore(part.keys), values=PlainStore(part.values), positions=shared(self.positions[:, :, :count]),
            counts=left.expand(-1, self.heads).cpu().clone(), dims=(part.keys.shape[-1], part.values.shape[-1]),
        )])  # fmt: skip
        plain.row = self.row
        return plain

    def _picked(self, rows: Tensor) -> Self:
        """A copy for these batch rows, whose own tensors are still to be picked."""
        new = copy.copy(self)
        new.positions = self.positions.index_select(0, rows.to(self.positions.device))
        return new
