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
from saccade.ops.decode import decode_beside


class Clock:
    """Which step of a window runs, counting from 0, as a number on the device: place `(1,)` int64."""

    def __init__(self, device: torch.device) -> None:
        self.place = torch.zeros(1, dtype=torch.int64, device=device)

    def set(self, place: int) -> None:
        self.place.fill_(place)


@dataclass(kw_only=True)
class Window:
    """keys `(B, H, size, D)` and values `(B, H, size, Dv)`: the room behind the first `begin` entries of `tail`. seen: tokens of the
    sequence when it was opened. running: whether the step at hand writes here. token: its key and value, until it attends. queries
    `(B, Hq, size, D)`: those of the steps, where somebody wants to see them."""

    tail: Tail
    begin: int
    seen: int
    size: int
    keys: Tensor
    values: Tensor
    clock: Clock
    running: bool = False
    token: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
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

    def take(self, k: Tensor, v: Tensor) -> None:
        """The keys and values `(B, H, 1, ...)` of this step's token, which are written when it attends."""
        self.token = k, v

    def ask(self, q: Tensor) -> None:
        """Keep the query `(B, Hq, 1, D)` of this step."""
        if self.queries is None:
            self.queries = q.new_zeros(*q.shape[:2], self.size, q.shape[3])
        self.queries.index_copy_(2, self.clock.place, q)

    def attend(self, q: Tensor, others: Partial | None, *, scale: float, softcap: float | None) -> Tensor:
        """Attention `(B, Hq, 1, Dv)` of q over the window's tokens so far, its own among them, and what `others` has read."""
        assert self.token is not None
        (k, v), self.token = self.token, None
        return decode_beside(q, k, v, self.keys, self.values, self.clock.place, others, scale=scale, softcap=softcap)
