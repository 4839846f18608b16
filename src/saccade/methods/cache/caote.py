"""CAOTE: how much a token matters is how far the attention output moves when it goes, which brings values into any score.

Scores h_j >= 0 of another policy become weights, and with them the exact effect of removing one entry (the others grow by
1 / (1 - alpha_j)):

    alpha_j = h_j / sum h,    o = sum_j alpha_j v_j,    c_j = alpha_j / (1 - alpha_j) |o - v_j|

The entries with the smallest c go, a block at a time: after each block alpha and o are those of the entries that are left. FastCAOTE
takes the mean of the values for o. c_j is exact for one entry and true attention weights; for other scores and for blocks it is a
ranking.

Source: caote, arXiv 2504.14051. The budget, the protected newest entries and the times at which entries go are those of the base. The
paper's prompt in blocks of m tokens, each followed by eviction, is `attach(..., when="call")` with prompts fed m tokens at a time. Its
TOVA base, the attention of the newest query alone, is "snapkv(window=1, kernel=1)" at the end of a prompt. A group's query heads share
one score, that of the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.methods import build
from saccade.parts.output_error import output_error
from saccade.parts.ragged import slots_of, staying
from saccade.parts.scored import Scored


@register
@dataclass(frozen=True, kw_only=True)
class CAOTE(CachePolicy):
    """Evicts by output error on top of the scores of another cache policy.

    base: spec of the policy that scores entries and says how many stay ("h2o(...)", "snapkv(...)"), or the policy. block: entries evicted
    before weights and output are computed anew. fast: the mean of the values in place of the output.
    """

    base: str | Scored = "h2o(budget=2048)"
    block: int = 128
    fast: bool = False

    info = Info(
        slug="caote", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False,
        opened={"base": "h2o(budget=1.0)"}, tiny={"base": "h2o(budget=0.4)", "block": 16},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"caote(block={self.block!r}) is not a number of entries: give an integer of at least 1")
        if not isinstance(self.fast, bool):
            raise ValueError(f"caote(fast={self.fast!r}) is neither True nor False")
        if isinstance(self.base, Scored):
            object.__setattr__(self, "base", self.base.spec)
        if not isinstance(self.base, str):
            raise ValueError(f"caote(base={self.base!r}) is not a cache policy with scores: name one, such as 'h2o(budget=0.2)'")
        self.scorer  # noqa: B018  (an unknown base is refused here)

    @property
    def scorer(self) -> Scored:
        """The policy whose scores are used."""
        assert isinstance(self.base, str)
        return _built(self.base)

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        self.scorer.watch(ctx.inside(self.scorer.info.slug), kv, q)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return self.scorer.due(ctx.inside(self.scorer.info.slug), length)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        base = self.scorer
        inside = ctx.inside(base.info.slug)
        count, recent = base.room(inside)
        if count >= kv.length or (scores := base.scores(inside, kv)) is None:
            return
        alive = torch.ones_like(kv.side["positions"], dtype=torch.bool) if kv.valid is None else kv.valid
        for left in (*range(kv.length - self.block, count, -self.block), count):
            # where a model stores one latent for all heads they keep the same entries, and their errors are averaged
            there = alive.expand(-1, kv.values.shape[1], -1)
            errors = output_error(scores.expand_as(there), kv.values, there, fast=self.fast)
            errors = errors.unflatten(1, (kv.heads, -1)).mean(2).masked_fill(~alive, -torch.inf)
            alive = alive & staying(errors, left, recent=recent, valid=kv.valid)
        kv.keep(*slots_of(alive))


@lru_cache(maxsize=64)
def _built(spec: str) -> Scored:
    base = build(spec)
    if not isinstance(base, Scored):
        raise ValueError(f"caote needs a cache policy that scores entries, which {base.info.slug} is not: name h2o or snapkv")
    return base
