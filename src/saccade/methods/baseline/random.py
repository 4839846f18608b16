"""Random eviction: the floor that every cache policy must beat at equal budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.keep import keep_best


@register
@dataclass(frozen=True, kw_only=True)
class Random(CachePolicy):
    """Keeps `sinks` first and `recent` last entries and fills the budget with entries drawn at random, in every head anew.

    budget: share of the tokens seen, or a number of tokens.
    """

    budget: float | int = 0.25
    sinks: int = 4
    recent: int = 32

    info = Info(
        slug="random", phase="cache", frees_memory=True, append_only=False, opened={"budget": 1.0},
        tiny={"budget": 0.5, "sinks": 1, "recent": 4},
        opts_out={"stepwise": "compresses when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("random has no scores: its budget is a ratio or a number of tokens")
        if self.sinks < 0 or self.recent < 0:
            raise ValueError(f"sinks={self.sinks} and recent={self.recent} must be at least 0")

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        # the same draws for every row of a batch: a row keeps what it would keep alone
        batch, heads, n = kv.side["positions"].shape
        draws = torch.rand(1, heads, n, generator=ctx.generator()).to(kv.keys.device).expand(batch, -1, -1)
        keep_best(kv, draws, Budget.of(self.budget).tokens(ctx.seen), sinks=self.sinks, recent=self.recent)
