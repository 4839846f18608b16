"""A static pattern that a model is trained with, in all phases: the prompt, single steps, and a cache that holds what is in view.

The same mask must hold wherever the model attends. As a prefill and as a decode method it reads the pattern's Selection; as a cache
policy it drops, block by block, what no later query reads. Everything that such a cache holds is in view of the next token, so that
single steps read all of it and need no decode method; a later turn reads all that was in view when it began.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from saccade.core import CachePolicy, Decode, LayerContext, Prefill, Selection, StoredKV
from saccade.parts.static.compiled import compile_pattern
from saccade.parts.static.keepset import drop_unneeded, note_places
from saccade.parts.static.pattern import Pattern

TILE = 128  # longest tile; a block is cut into equal tiles


class StaticArchitecture(Prefill, Decode, CachePolicy):
    """block: tokens a block; all borders of the pattern lie between blocks."""

    block: int

    @abstractmethod
    def pattern(self, ctx: LayerContext) -> Pattern | None:
        """This layer's pattern; None where the layer is dense, or too short a sequence to leave anything out."""

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k, pattern = q.shape[2], k.shape[2], self.pattern(ctx)
        if pattern is None:
            return Selection.full(n_q, n_k, device=q.device)
        # tiles that lie inside blocks on both sides make the lists exact, also where a chunk begins inside a block
        block_k = max(t for t in range(1, min(TILE, self.block) + 1) if self.block % t == 0)
        block_q = math.gcd(block_k, n_k - n_q)
        return compile_pattern(pattern, n_q, n_k, block_q=block_q, block_k=block_k, device=q.device).selection

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.pattern(ctx) is None or ctx.seen > k.shape[2]:
            return ctx.attend(q, k, v, None)
        selection = self.select(ctx, q, k, v)
        if ctx.phase == "decode":
            ctx.publish(selection)
        return ctx.attend(q, k, v, selection)

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        note_places(ctx, kv, q.shape[2])

    def due(self, ctx: LayerContext, length: int) -> bool:
        # entries go block by block: when a step has filled one up, or guesses that were taken back had
        return self.pattern(ctx) is not None and ctx.state.get("served", 0) // self.block != ctx.seen // self.block

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        pattern = self.pattern(ctx)
        if pattern is not None:
            ctx.state["served"] = ctx.seen
            drop_unneeded(ctx, kv, pattern)
