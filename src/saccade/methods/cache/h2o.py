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

from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.accumulated import accumulate, accumulated
from saccade.parts.scored import Scored


@register
@dataclass(frozen=True, kw_only=True)
class H2O(Scored):
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

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        accumulate(ctx, kv, q)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > self.room(ctx)[0]

    def room(self, ctx: LayerContext) -> tuple[int, int]:
        count = Budget.of(self.budget).tokens(ctx.seen)
        return count, int(count * self.recent)

    def scores(self, ctx: LayerContext, kv: StoredKV) -> Tensor:
        return accumulated(ctx, kv)
