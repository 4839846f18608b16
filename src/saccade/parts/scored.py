"""Cache policies that keep the entries with the highest scores, and the newest."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from saccade.core import CachePolicy, LayerContext, StoredKV
from saccade.parts.keep import keep_best


class Scored(CachePolicy):
    """A policy that is its scores: another method may ask for them and put its own rule on top."""

    @abstractmethod
    def scores(self, ctx: LayerContext, kv: StoredKV) -> Tensor | None:
        """How much each entry matters, `(B, heads, n)`, at least 0, float32 (float64 for float64 keys); None when nothing is known yet.

        heads: those of the keys, or those that are stored where a model stores one latent for all.
        """

    @abstractmethod
    def room(self, ctx: LayerContext) -> tuple[int, int]:
        """How many entries a head may hold now, and how many of these are the newest, whatever their score."""

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        count, recent = self.room(ctx)
        if count < kv.length and (scores := self.scores(ctx, kv)) is not None:
            keep_best(kv, scores, count, recent=recent)
