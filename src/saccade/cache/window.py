"""Room for a layer's next tokens, written at a place that only the device knows, so that one recorded step serves many tokens.

A CUDA graph repeats its kernels with the addresses and sizes they were recorded with. The entries that a layer holds are therefore left
alone while a window is open: a step reads them as they stand, writes its token behind them at the clock's place, and reads the tokens
written so far by the clock's count. The host counts along, so that to everyone else the layer is a token longer after each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.cache.tail import Tail
from saccade.core import Partial
from saccade.ops.decode import decode


class Clock:
    """Which step of a window runs, as numbers on the device: place `(1,)` int64, counting from 0, and filled `(B,)` int32, the tokens in
    the window with the one of this step."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.place = torch.zeros(1, dtype=torch.int64, device=device)
        self.filled = torch.zeros(batch, dtype=torch.int32, device=device)

    def set(self, place: int) -> None:
        self.place.fill_(place)
        self.filled.fill_(place + 1)


@dataclass(kw_only=True)
class Window:
    """keys `(B, H, size, D)` and values `(B, H, size, Dv)`: the room behind the first `begin` entries of `tail`. seen: tokens of the
    sequence when it was opened. running: whether the step at hand writes here. queries `(B, Hq, size, D)`: those of the steps, where
    somebody wants to see them."""

    tail: Tail
    begin: int
    seen: int
    size: int
    keys: Tensor
    values: Tensor
    clock: Clock
    running: bool = False
    queries: Tensor | None = field(default=None, repr=False)

    @classmethod
    def behind(cls, tail: Tail, seen: int, size: int, clock: Clock) -> Window:
        """Room for `size` tokens after those of `tail`, of `seen` in the sequence. ValueError for a tail with padding."""
        begin, room = tail.n, tail.room(size, seen)
        return cls(tail=tail, begin=begin, seen=seen, size=size, keys=room[0], values=room[1], clock=clock)

    @property
    def frozen(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the entries before the window."""
        return self.tail.keys[:, :, : self.begin], self.tail.values[:, :, : self.begin]

    def left_by(self, steps: int, tail: Tail | None, seen: int) -> bool:
        """Whether a layer that holds `tail` after `seen` tokens is as so many steps have left it."""
        return tail is self.tail and self.tail.n - self.begin == seen - self.seen == steps

    def write(self, k: Tensor, v: Tensor) -> None:
        """The keys and values `(B, H, 1, ...)` of this step's token."""
        self.keys.index_copy_(2, self.clock.place, k)
        self.values.index_copy_(2, self.clock.place, v)

    def ask(self, q: Tensor) -> None:
        """Keep the query `(B, Hq, 1, D)` of this step."""
        if self.queries is None:
            self.queries = q.new_zeros(*q.shape[:2], self.size, q.shape[3])
        self.queries.index_copy_(2, self.clock.place, q)

    def read(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, 1, D)` over the tokens written so far, its own among them, with log-sum-exp."""
        return decode(q, self.keys, self.values, lengths=self.clock.filled, scale=scale, softcap=softcap, return_lse=True)
