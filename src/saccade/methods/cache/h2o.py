"""H2O, the heavy-hitter oracle: a few tokens collect most of the attention; keep those and the newest.

Every stored entry carries the attention it has received so far, summed over all queries and over the query heads of its
group:

    S_j = sum_{i >= j} softmax_j(q_i.k_j / sqrt(D)).

At the end of the prompt, and after every step once the budget b is passed, the entries with the smallest S outside the
newest b_r are dropped, their S with them; a dropped entry never comes back.

Source: h2o, arXiv 2306.14048.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.keep import keep_best
from saccade.parts.mass_sums import mass_sums
from saccade.parts.recent_queries import GUESSES, recall, remember

MASS = "mass"  # the side array of S


@register
@dataclass(frozen=True, kw_only=True)
class H2O(CachePolicy):
    """Keeps b entries a head: the heavy hitters and the newest.

    budget: b, a share of the tokens seen (it grows with them) or a number of tokens. recent: the share of b that goes
    to the newest entries, rounded down; the rest goes to heavy hitters.
    """

    budget: float | int = 0.2
    recent: float = 0.5

    info = Info(
        slug="h2o", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False,
        opened={"budget": 1.0}, tiny={"budget": 0.4},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"h2o keeps a fixed number, not {amount}: give a ratio or a number of tokens")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"recent={self.recent} is not a share of the budget: give a number from 0 to 1")

    def observe(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        waiting = recall(ctx.state, ctx.seen - q.shape[2])
        queries = q if waiting is None else torch.cat([waiting, q], dim=2)
        # tokens after the first of a call may be guesses that are taken back: what they look at is added later
        self._settle(ctx, kv, queries, keep=GUESSES if q.shape[2] > 1 else 0)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > Budget.of(self.budget).tokens(ctx.seen)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        count = Budget.of(self.budget).tokens(ctx.seen)
        if count >= kv.length:
            return
        self._settle(ctx, kv, recall(ctx.state, ctx.seen), keep=0)
        keep_best(kv, kv.side[MASS], count, recent=int(count * self.recent))

    def _settle(self, ctx: LayerContext, kv: StoredKV, queries: Tensor | None, keep: int) -> None:
        """Add the attention of these newest queries to S, all but the last `keep`, which wait."""
        mass = kv.side.get(MASS)
        if mass is None:
            shape = (kv.keys.shape[0], kv.heads, kv.length)
            mass = torch.zeros(shape, dtype=torch.promote_types(kv.keys.dtype, torch.float32), device=kv.keys.device)
        if queries is not None:
            waiting = min(keep, queries.shape[2])
            settled = queries.shape[2] - waiting
            sums = mass_sums(
                queries[:, :, :settled], kv.keys, scale=ctx.scale, softcap=ctx.softcap, valid=kv.valid, behind=waiting
            )
            # where one latent is stored for all heads: what they received together
            mass = mass + sums.unflatten(1, (kv.heads, -1)).sum(2)
            remember(ctx.state, queries[:, :, settled:], ctx.seen, waiting)
        kv.side[MASS] = mass
