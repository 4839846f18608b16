"""TidalDecode: tokens that matter to one layer matter to the next ones, so two layers search and all others read what they found.

    layers 0 ... start - 1      dense
    layers start, correction    dense, and for each query head   I_h = top-k_j q_h.k_j
    all other layers            softmax over I_h alone, of the same head number in the last searching layer

at every step anew, with the newest token always among I_h. No more than start + 2 layers touch all keys, however deep the model is.

The paper's optional cache correction computes the keys and values of the last T generated tokens anew with full attention. That takes the
model and its token ids, not one layer's attention: `cache.crop(-T)` and a call of the model with these T tokens does it from outside, T
being more than the 16 tokens up to which a call counts as decoding.

Source: tidaldecode, arXiv 2410.05076, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import Reduce
from saccade.parts.heads import check_reduction, reduce_heads
from saccade.parts.pick import pick_best, read_tokens
from saccade.parts.planner import Planner, check_place, layer_at, role_of, step_logits


@register
@dataclass(frozen=True, kw_only=True)
class TidalDecode(Planner):
    """budget: tokens k that the following layers read per step and query head (int; the paper tries 64 to 4096), or their share (float).
    start: the first layer that searches; those before it are dense.
    correction: the layer that searches again, by number (int) or as a share of the depth (float): 13 of 32 in the paper's Llama-3-8B,
        found by the accuracy on needles. None: no second search.
    reduce: "none" as in the paper; "group_max" and "group_sum" search once for the query heads that share a key head.
    """

    budget: float | int = 512
    start: int = 2
    correction: float | int | None = 0.4
    reduce: Reduce = "none"

    info = Info(
        slug="tidaldecode", phase="decode", reads_encoded=True, recordable=True, opened={"budget": 1.0},
        tiny={"budget": 0.25, "start": 0, "correction": None},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.start, bool) or not isinstance(self.start, int) or self.start < 0:
            raise ValueError(f"tidaldecode got start={self.start!r}: expected a layer's number from 0 on")
        if self.correction is not None:
            check_place("tidaldecode", "correction", self.correction)
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("tidaldecode reads a fixed number of tokens: its budget is a ratio or a number of tokens")
        check_reduction("tidaldecode", self.reduce)

    def role(self, ctx: LayerContext) -> LayerPolicy:
        full = set(range(self.start + 1))
        if self.correction is not None:
            full.add(max(self.start, layer_at(self.correction, ctx.layers)))
        return role_of(ctx.layer, ctx.layers, full)

    def reads_all(self, n: int) -> bool:
        return Budget.of(self.budget).tokens(n) >= n

    def scores(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        return step_logits(ctx, q, k, self.reduce)

    def choose(self, ctx: LayerContext, logits: Tensor) -> Selection:
        n = logits.shape[-1]
        whole = logits.shape[1] == ctx.layout.query_heads  # and not one row a group already
        scores = reduce_heads(logits, ctx.layout.kv_heads, self.reduce) if whole else logits
        scores[..., -1] = torch.inf  # the newest token
        return read_tokens(pick_best(scores, Budget.of(self.budget).tokens(n)), n)
