"""What methods with a window and a far memory share: a stream read in chunks, far tokens at one fixed distance, storage on the host.

A chunk of queries at places s ... t - 1 reads

    local     the n_local newest keys of each query, itself included, with their rotary angles
    far       the first n_init keys, units of older tokens that the method retrieves for the chunk, and the tokens between the last whole
              unit and the window: queries turned to the place n_local and keys not turned, so that each is n_local tokens away

in one softmax. A token between units and window is far only for the queries that it is n_local or more tokens before, so that none is
counted twice. Positions do not grow with the stream. When a prompt has ended, and as units leave the window in decoding, what lies before
the border of units moves to the host with keys unturned, but for the first n_init. Where a model has no rotary embedding that can be
turned back, and for bare tensors, keys stay as they are.

Source: infllm, arXiv 2402.04617, sections 3.1 and 3.2.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.cache.offloaded import OffloadedSegment
from saccade.cache.stream import Stream
from saccade.core import CachePolicy, Decode, LayerContext, Prefill, Rotary, Selection, StoredKV, merge
from saccade.parts.rotary import turn

SEALED = 4  # units that leave the window in decoding before they move to the host together
NEVER = torch.iinfo(torch.int32).max  # the position of a key that nobody sees


class Retrieved(NamedTuple):
    """keys `(B, Hk, m, D)` unturned and values of the tokens that a chunk reads; valid `(B, m)` bool, None when all are."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FarMemory(Prefill, Decode, CachePolicy):
    """n_local: keys of a query's window, itself included. n_init: first keys, always read. chunk: queries that share a retrieval, e."""

    n_local: int = 4096
    n_init: int = 128
    chunk: int = 512

    def check_window(self) -> None:
        """ValueError unless the fields of the window fit together."""
        for name, least in (("n_local", 1), ("n_init", 0), ("chunk", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{self.info.slug}({name}={value!r}) is not a whole number of at least {least}")
        if self.chunk > self.n_local:
            raise ValueError(f"{self.info.slug}(chunk={self.chunk}) is more than its window of n_local={self.n_local}: give less or equal")

    # -- what a method adds ------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def unit(self) -> int:
        """Tokens after which the border of the far memory moves on."""

    @abstractmethod
    def fresh(self) -> Any:
        """The memory of a new sequence, with `reorder` and `nbytes`."""

    @abstractmethod
    def retrieve(
        self, ctx: LayerContext, memory: Any, stream: Stream, q: Tensor, begin: int
    ) -> Callable[[], Retrieved] | None:
        """Start to fetch what queries q `(B, Hq, m, D)`, turned to n_local, from place `begin` on read of the places n_init ... border.

        None where there is nothing to retrieve.
        """

    @abstractmethod
    def take_in(self, ctx: LayerContext, memory: Any, stream: Stream, q: Tensor, begin: int) -> None:
        """After a chunk was read: its queries q `(B, Hq, m, D)` as they are, from place `begin` on."""

    # -- the stream --------------------------------------------------------------------------------------------------------

    def units(self, begin: int) -> int:
        """Whole units that have left the window of a query at place `begin`."""
        return max(0, (begin - self.n_local + 1 - self.n_init) // self.unit)

    def border(self, begin: int) -> int:
        """The place after them."""
        return self.n_init + self.units(begin) * self.unit

    def memory(self, ctx: LayerContext) -> Any:
        """The sequence's memory of this layer, which prompts, steps and later turns share."""
        return ctx.sequence.setdefault(f"{self.info.slug} {ctx.layer}", self.fresh())

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """The local window and the first keys, without what is retrieved."""
        size = min(self.n_local, k.shape[2])
        return Selection.window(q.shape[2], k.shape[2], size, sinks=self.n_init, block_q=1, block_k=16, device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stream = Stream(ctx.segments, k, v, rotary_of(ctx))
        memory, first, outs = self.memory(ctx), stream.n - q.shape[2], []
        for begin in range(first, stream.n, self.chunk):
            rows = q[:, :, begin - first : begin - first + self.chunk]
            outs.append(self._chunk(ctx, memory, stream, rows, begin))
            self.take_in(ctx, memory, stream, rows, begin)
        return torch.cat(outs, dim=2)

    def _chunk(self, ctx: LayerContext, memory: Any, stream: Stream, q: Tensor, begin: int) -> Tensor:
        end = begin + q.shape[2]
        middle, low = max(0, end - self.n_local), max(0, begin - self.n_local + 1)
        places = torch.arange(begin, end, device=q.device, dtype=torch.int32)[None, None]
        far, found = None, None
        if middle:
            far = q if stream.rotary is None else turn(q, self.n_local - places, stream.rotary)
            found = self.retrieve(ctx, memory, stream, far, begin)
        parts = [ctx.partial(q, *stream.turned(middle, end), None)]
        if low < middle:
            # keys that have left the window of the last queries but not of the first: seen backwards, a query must not be too late
            keys = torch.arange(low, middle, device=q.device, dtype=torch.int32)[None, None]
            seen = {"q_positions": -places, "k_positions": -(keys + self.n_local - 1)}
            parts.append(ctx.partial(q, *stream.turned(low, middle), None, **seen))
        if far is not None:
            sinks = torch.arange(min(self.n_init, middle), device=q.device)
            between = torch.arange(min(self.border(begin), middle), middle, device=q.device)
            near = torch.cat([sinks, between])
            keys, values = stream.unturned(near.expand(q.shape[0], -1))
            since = (near + self.n_local).to(torch.int32).expand(q.shape[0], 1, -1)
            if found is not None:
                more = found()
                keys, values = torch.cat([more.keys, keys], dim=2), torch.cat([more.values, values], dim=2)
                open_ = since.new_zeros(q.shape[0], 1, more.keys.shape[2])
                open_ = open_ if more.valid is None else open_.masked_fill(~more.valid.unsqueeze(1), NEVER)
                since = torch.cat([open_, since], dim=-1)
            # a single query is late enough for every far key, unless a row of the batch was filled up
            seen = {} if end - begin == 1 and not bool((since == NEVER).any()) else {"q_positions": places, "k_positions": since}
            parts.append(ctx.partial(far, keys, values, None, **seen))
        return merge(*parts).out

    # -- storage -----------------------------------------------------------------------------------------------------------

    def rewind(self, ctx: LayerContext, n: int) -> int:
        """The memory goes by places, and forgets what came after the next query's."""
        return n

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > self.n_local + self.n_init + SEALED * self.unit

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        begin = ctx.seen - kv.length
        n = self.border(ctx.seen) - begin
        if self.units(ctx.seen) and n > 0:
            near = max(0, self.n_init - begin)
            side = {"positions": kv.side["positions"][:, :, :n]}
            keys, values = kv.keys[:, :, :n], kv.values[:, :, :n]
            kv.seal(OffloadedSegment.of(keys, values, side, begin=begin, near=near, rotary=rotary_of(ctx)), n)


def rotary_of(ctx: LayerContext) -> Rotary | None:
    """The layer's rotary embedding; None where it turns nothing."""
    return ctx.rotary if ctx.rotary is not None and ctx.rotary.inv_freq.numel() else None
