"""SnapKV: what the last prompt tokens look at is what generation will look at.

When the prompt has ended, the queries of its last w tokens (the observation window) vote on every older entry j of
their head,

    vote_j = sum_{i > n - w} softmax_j(q_i.k_j / sqrt(D))        over all n entries, causal inside the window,

votes are pooled over neighbouring positions, so that what stands next to a peak survives with it, and averaged over the
query heads of a group. The entries with the highest votes stay together with the window; later tokens are appended and
not compressed.

Source: snapkv, arXiv 2404.14469.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.recent_queries import GUESSES, recall, remember
from saccade.parts.scored import Scored
from saccade.parts.window_votes import window_votes


@register
@dataclass(frozen=True, kw_only=True)
class SnapKV(Scored):
    """Keeps the observation window and the entries it votes for; a later turn is compressed again, with its own window.

    budget: entries kept per head, the window included: a number of tokens, or a share of the tokens seen. window:
    tokens at the end of the prompt whose queries vote. kernel: positions that votes are pooled over (odd; 1 turns it
    off). pooling: "average" or "max".
    """

    budget: float | int = 1024
    window: int = 32
    kernel: int = 5
    pooling: Literal["average", "max"] = "average"

    info = Info(
        slug="snapkv", phase="cache", needs=frozenset({"queries"}), frees_memory=True, append_only=False,
        opened={"budget": 1.0}, tiny={"budget": 0.5, "window": 8, "kernel": 3},
        opts_out={"stepwise": "compresses when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        amount = Budget.of(self.budget).amount
        if isinstance(amount, Mass | Threshold):
            raise ValueError(f"snapkv keeps a fixed number, not {amount}: give a ratio or a number of tokens")
        if self.window < 1:
            raise ValueError(f"window={self.window} leaves nobody to vote: give at least 1 token")
        if isinstance(amount, int) and amount <= self.window:
            raise ValueError(f"budget={amount} leaves no room beside the window of {self.window}: give more tokens")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no middle: give an odd number of positions such as 5 or 7")
        if self.pooling not in ("average", "max"):
            raise ValueError(f"pooling={self.pooling!r} is not 'average' or 'max'")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        # the prompt may end some tokens before these do: guesses at its end can be taken back
        remember(ctx.state, q, ctx.seen, self.window + GUESSES)

    def room(self, ctx: LayerContext) -> tuple[int, int]:
        return Budget.of(self.budget).tokens(ctx.seen), self.window

    def scores(self, ctx: LayerContext, kv: StoredKV) -> Tensor | None:
        queries = recall(ctx.state, ctx.seen)
        if queries is None:
            return None
        return window_votes(
            queries[:, :, -self.window :], kv.keys, scale=ctx.scale, softcap=ctx.softcap, valid=kv.valid,
            kernel=self.kernel, pooling=self.pooling, behind=self.window,
        )  # fmt: skip
