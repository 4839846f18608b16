"""Heads of two kinds in one layer: some keep and read everything, the others the first tokens and the newest, in all phases.

In the prompt the two kinds run apart: full heads densely, streaming heads over `sink | window` in blocks. In the cache they hold different
numbers of entries (ragged storage), and a streaming head drops a block once no later query reads it. What a streaming head holds is the
first blocks and then one run up to the newest token, cut at the borders of blocks, so that its entries, one after another, are a short
sequence in which the same pattern holds: chunks and later turns are read with it as the prompt was, in constant memory.

Sources: duoattention, arXiv 2410.10819, section 3; streaming heads as streaming-llm, arXiv 2309.17453, at their true positions.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from saccade.cache.segment import PackedSegment
from saccade.core import CachePolicy, Decode, LayerContext, Partial, Prefill, Selection, StoredKV, merge
from saccade.parts.ragged import slots_of
from saccade.parts.static import Pattern, compile_pattern, sink, window

EVERYTHING = 1 << 40  # blocks


class SplitHeads(Prefill, Decode, CachePolicy):
    """sinks, recent: tokens that streaming heads read, rounded up to whole blocks; a query's own block comes on top. block: tokens."""

    sinks: int
    recent: int
    block: int

    @abstractmethod
    def full_heads(self, ctx: LayerContext) -> Tensor:
        """Which key/value heads of this layer keep everything, bool `(Hk,)`."""

    @property
    def _blocks(self) -> tuple[int, int]:
        """Blocks of sinks, and of the window with the query's own."""
        return math.ceil(self.sinks / self.block), math.ceil(self.recent / self.block) + 1

    def _pattern(self, full: list[bool]) -> Pattern:
        first, newest = self._blocks
        reach = tuple(EVERYTHING if whole else newest for whole in full)
        return sink(first, block=self.block) | window(reach, block=self.block)

    def _selection(self, pattern: Pattern, n_q: int, n_k: int, device: torch.device) -> Selection:
        # tiles inside blocks on both sides make the lists exact, also where a chunk begins inside a block
        tile = math.gcd(self.block, n_k - n_q)
        return compile_pattern(pattern, n_q, n_k, block_q=tile, block_k=self.block, device=device).selection

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """What all heads read, where all hold the same entries."""
        return self._selection(self._pattern(self.full_heads(ctx).tolist()), q.shape[2], k.shape[2], q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        outs = []
        for heads, whole in _runs(self.full_heads(ctx).tolist()):
            rows = q[:, heads.start * group : heads.stop * group]
            held, keys, values = _held(ctx, heads), k[:, heads], v[:, heads]
            n = keys.shape[2] + (0 if held is None else held[0].shape[2])
            if whole or not self._skips(n - 1):
                outs.append(_dense(ctx, rows, held, keys, values))
                continue
            if held is not None:
                keys, values = torch.cat([held[0], keys], 2), torch.cat([held[1], values], 2)
            pattern = self._pattern([False])
            outs.append(ctx.attend(rows, keys, values, self._selection(pattern, rows.shape[2], n, q.device)))
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _skips(self, place: int) -> bool:
        """Whether the query at `place` leaves out any entry between the first blocks and its window."""
        first, newest = self._blocks
        return place // self.block - newest + 1 > first

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def due(self, ctx: LayerContext, length: int) -> bool:
        return ctx.state.get("served", 0) // self.block != ctx.seen // self.block

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if kv.heads != ctx.layout.kv_heads:
            raise ValueError(f"layer {ctx.layer} caches one latent for all heads, whose heads can't keep different tokens")
        ctx.state["served"] = ctx.seen
        full = self.full_heads(ctx).to(kv.keys.device).view(1, -1, 1)
        slots = torch.arange(kv.length, device=kv.keys.device)
        held = torch.tensor(kv.length, device=slots.device) if kv.valid is None else kv.valid.sum(-1, keepdim=True)
        first, newest = self._blocks
        # the next query stands behind what is held
        begin = (held // self.block - newest + 1) * self.block
        stay = (full | (slots < first * self.block) | (slots >= begin)).expand(*kv.side["positions"].shape[:2], -1)
        stay = stay if kv.valid is None else stay & kv.valid
        if bool((stay if kv.valid is None else stay | ~kv.valid).all()):
            return
        kv.keep(*slots_of(stay))


def _runs(full: list[bool]) -> Iterator[tuple[slice, bool]]:
    """Neighbouring heads of one kind, together."""
    begin = 0
    for end in range(1, len(full) + 1):
        if end == len(full) or full[end] != full[begin]:
            yield slice(begin, end), full[begin]
            begin = end


def _held(ctx: LayerContext, heads: slice) -> tuple[Tensor, Tensor] | None:
    """Keys and values `(1, heads, n, ...)` that stand before the tail, views of ragged storage; None where the tail holds all."""
    if not ctx.segments:
        return None
    packed = ctx.segments[0]
    counts = packed.lengths()[0][heads] if isinstance(packed, PackedSegment) and len(ctx.segments) == 1 else []
    if len(set(counts)) != 1:
        raise ValueError(f"layer {ctx.layer}: heads of one kind hold different numbers of tokens: another method or plan made this cache")
    begin, end = packed.offsets[heads.start], packed.offsets[heads.stop]
    return tuple(x[begin:end].unflatten(0, (len(counts), -1)).unsqueeze(0) for x in (packed.keys, packed.values))  # pyright: ignore[reportReturnType]


def _dense(ctx: LayerContext, q: Tensor, held: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> Tensor:
    if held is None or not held[0].shape[2]:
        return ctx.attend(q, k, v, None)
    parts: list[Partial] = [ctx.partial(q, *held, None, **({} if ctx.phase == "decode" else {"causal": False}))]
    if k.shape[2]:
        parts.append(ctx.partial(q, k, v, None))
    return merge(*parts).out
