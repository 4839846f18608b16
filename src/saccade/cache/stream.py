"""All entries of a layer by their place in the sequence: the sealed segments on the host first, then those stored in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.cache.offloaded import OffloadedSegment
from saccade.core import Rotary
from saccade.parts.rotary import turn


class Stream:
    """k `(B, Hk, m, D)`, v: the newest entries, keys turned to their places. segments: the older ones, without gaps, keys unturned.

    rotary: None where keys carry no position that could be taken off them.
    """

    def __init__(self, segments: Sequence[OffloadedSegment], k: Tensor, v: Tensor, rotary: Rotary | None) -> None:
        self.segments, self.k, self.v, self.rotary = segments, k, v, rotary
        self.held = segments[-1].end if segments else 0

    @property
    def n(self) -> int:
        return self.held + self.k.shape[2]

    def turned(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys, turned to their places, and values of the places begin ... end - 1."""
        k, v = (x[:, :, max(0, begin - self.held) : max(0, end - self.held)] for x in (self.k, self.v))
        if begin >= self.held:
            return k, v
        places = torch.arange(begin, min(end, self.held), device=k.device)
        keys, values = self.unturned(places.expand(k.shape[0], -1))
        keys = keys if self.rotary is None else turn(keys, places, self.rotary)
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)

    def unturned(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(B, Hk, m, D)` before the rotary embedding and values at `places (B, m)` int64."""
        rows = torch.arange(places.shape[0], device=places.device)
        return self.begin(rows, places)()

    def begin(self, rows: Tensor, places: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start to fetch `places (M, m)` int64 of batch rows `rows (M,)`.

        The result, when called, gives keys `(M, Hk, m, D)` before the rotary embedding and values `(M, Hk, m, Dv)`.
        """
        flat, row = places.flatten(), rows.unsqueeze(-1).expand_as(places).flatten()
        begun = []
        for segment in self.segments:
            inside = ((flat >= segment.begin) & (flat < segment.end)).nonzero().squeeze(-1)
            if inside.numel():
                begun.append((inside, segment.begin_pick(row[inside], flat[inside])))
        own = (flat >= self.held).nonzero().squeeze(-1)
        if own.numel():
            keys, values = (x[row[own], :, flat[own] - self.held] for x in (self.k, self.v))
            keys = keys if self.rotary is None else turn(keys, -flat[own].unsqueeze(-1), self.rotary)
            begun.append((own, lambda: (keys, values)))

        def finish() -> tuple[Tensor, Tensor]:
            found = [x.new_empty(len(flat), x.shape[1], x.shape[3]) for x in (self.k, self.v)]
            for inside, rest in begun:
                for whole, part in zip(found, rest(), strict=True):
                    whole[inside] = part
            keys, values = (x.view(*places.shape, *x.shape[1:]).transpose(1, 2) for x in found)
            return keys, values

        return finish
