"""L2 norm: keys of small norm tend to receive much attention, so keep those, without looking at any query.

    keep the entries with the smallest ||k_j||_2 of each head

The rotary embedding does not change norms. Where a model normalises its keys (QK-norm), all norms are alike and what is
kept is close to chance.

Source: l2-norm, arXiv 2406.11430. The paper protects no newest entries; `recent` does, for generation needs them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.keep import keep_best


@register
@dataclass(frozen=True, kw_only=True)
class L2Norm(CachePolicy):
    """Keeps the entries with the smallest key norms, in every head, at the end of the prompt and whenever the cache
    passes its limit.

    budget: entries kept, a share of the tokens seen or a number of tokens. skip_layers: layers left alone (the first
    ones, where norm and attention hardly agree). prune_after: a cache of at most so many entries is left alone. recent:
    newest entries that stay whatever their norm, out of the budget.
    """

    budget: float | int = 0.5
    skip_layers: tuple[int, ...] = (0, 1)
    prune_after: int = 1024
    recent: int = 32

    info = Info(
        slug="l2-norm", phase="cache", frees_memory=True, append_only=False, opened={"budget": 1.0},
        tiny={"budget": 0.5, "skip_layers": (), "prune_after": 16, "recent": 4},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"l2-norm keeps a fixed number, not {amount}: give a ratio or a number of tokens")
        given = self.skip_layers
        if not isinstance(given, tuple | list) or not all(type(layer) is int and layer >= 0 for layer in given):
            raise ValueError(f"skip_layers={given!r} is not a tuple of layer numbers such as (0, 1)")
        object.__setattr__(self, "skip_layers", tuple(given))
        if self.prune_after < 0 or self.recent < 0:
            raise ValueError(f"prune_after={self.prune_after} and recent={self.recent} must be at least 0")

    def due(self, ctx: LayerContext, length: int) -> bool:
        limit = max(self.prune_after, Budget.of(self.budget).tokens(ctx.seen))
        return ctx.layer not in self.skip_layers and length > limit

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if self.due(ctx, kv.length):
            norms = kv.keys.norm(dim=-1, dtype=torch.promote_types(kv.keys.dtype, torch.float32))
            keep_best(kv, -norms, Budget.of(self.budget).tokens(ctx.seen), recent=self.recent)
