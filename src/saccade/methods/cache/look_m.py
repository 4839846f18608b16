"""LOOK-M: text matters most in a prompt with images, so keep the text, few image entries, and fold the others into what is like them.

When the prompt has ended, each head scores its entries by the attention they received; text is put before images (the text prior), so
that image entries go first. Kept are the newest and the best; every evicted e goes to the kept entry with the nearest key, c(e) =
argmax_c cos(k_e, k_c), and a kept entry with m members becomes

    average     (k_c + sum k_e) / (m + 1)
    pivotal     (k_c + sum (k_e + k_c) / 2) / (m + 1)
    weighted    (k_c + sum cos(k_e, k_c) k_e) / (m + 1)

with the same rule for values. Generated tokens are appended and not compressed ("look once"); a later turn's prompt is compressed again.

Source: look-m, arXiv 2406.18139. Which tokens stand for images is `kv.side["vision"]`; without it all is text, and this is H2O at the
end of the prompt, with merging. Chosen here: newest image entries give way to text, so that no text is lost to a budget that could hold
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.accumulated import accumulate, accumulated
from saccade.parts.merging import WEIGHTS, check_mergeable, fold, merge_entries, to_nearest
from saccade.parts.ragged import staying

RULES = {"average": "average", "pivotal": "pivotal", "weighted": "cosine"}  # the paper's names


@register
@dataclass(frozen=True, kw_only=True)
class LookM(CachePolicy):
    """Keeps text before images and merges what it evicts.

    budget: entries kept per head, a share of the tokens seen or a number of tokens. recent: the share of the budget for the newest
    entries. merge: "average", "pivotal" or "weighted". text_prior: whether text outranks images; without it the first `sinks` entries
    stay instead.
    """

    budget: float | int = 0.2
    recent: float = 0.5
    merge: Literal["average", "pivotal", "weighted"] = "pivotal"
    text_prior: bool = True
    sinks: int = 4

    info = Info(
        slug="look-m", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False,
        opened={"budget": 1.0}, tiny={"budget": 0.4},
        opts_out={"stepwise": "compresses when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"look-m(budget={amount}) is not a fixed number: give a ratio or a number of tokens")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"look-m(recent={self.recent!r}) is not a share of the budget: give a number from 0 to 1")
        if self.merge not in RULES:
            raise ValueError(f"look-m(merge={self.merge!r}) is not one of {', '.join(RULES)}")
        if not isinstance(self.text_prior, bool):
            raise ValueError(f"look-m(text_prior={self.text_prior!r}) is neither True nor False")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"look-m(sinks={self.sinks!r}) is not a number of entries: give an integer of at least 0")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        check_mergeable("look-m", ctx, kv)
        accumulate(ctx, kv, q)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        count = Budget.of(self.budget).tokens(ctx.seen)
        if count >= kv.length:
            return
        stay = self._staying(kv, accumulated(ctx, kv), count)
        into, similarity = to_nearest(stay, ~stay if kv.valid is None else kv.valid & ~stay, kv.keys)
        weights = WEIGHTS[RULES[self.merge]](into, similarity)
        merge_entries(kv, into, fold(kv.keys, into, weights), fold(kv.values, into, weights))

    def _staying(self, kv: StoredKV, mass: Tensor, count: int) -> Tensor:
        recent = int(count * self.recent)
        vision = kv.side.get("vision")
        if not self.text_prior or vision is None:
            return staying(mass, count, sinks=0 if self.text_prior else self.sinks, recent=recent, valid=kv.valid)
        slots = torch.arange(kv.length, device=mass.device)
        held = kv.length if kv.valid is None else kv.valid.sum(-1, keepdim=True)
        # from the last to the first to go: newest text, text, newest images, images; by attention within each
        order = 2.0 * (vision == 0) + (slots >= held - recent)
        return staying(2 * order + mass / mass.amax(-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny), count, valid=kv.valid)
