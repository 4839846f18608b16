"""A sealed segment for tests."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from saccade.cache import Rectangle, Segment


class Plain(Segment):
    """The simplest sealed segment: entries as they are; heads may come to differ in length when tokens are taken
    back."""

    encoded = True

    def __init__(self, content: Rectangle) -> None:
        self.content = content

    @property
    def length(self) -> int:
        return max((n for row in self.lengths() for n in row), default=0)

    def lengths(self) -> list[list[int]]:
        valid = self.content.valid
        return (torch.ones_like(self.content.side["positions"]) if valid is None else valid).sum(-1).tolist()

    @property
    def kv_bytes(self) -> int:
        return self.content.keys.untyped_storage().nbytes() + self.content.values.untyped_storage().nbytes()

    @property
    def side_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.content.side.values())

    def read(self, begin: int, end: int) -> Rectangle:
        c = self.content
        side = {name: x[:, :, begin:end] for name, x in c.side.items()}
        return Rectangle(c.keys[:, :, begin:end], c.values[:, :, begin:end], side, c.valid)

    def take_rows(self, rows: Tensor) -> Plain:
        c = self.content
        side = {name: x[rows] for name, x in c.side.items()}
        return Plain(Rectangle(c.keys[rows], c.values[rows], side, None if c.valid is None else c.valid[rows]))

    def bound_to(self, row: int) -> Plain:
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> Plain:
        new = copy.copy(self)
        kept = self.content.side["positions"] < position
        valid = kept if self.content.valid is None else kept & self.content.valid
        new.content = Rectangle(self.content.keys, self.content.values, self.content.side, valid)
        return new
