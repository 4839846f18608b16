"""LessIsMore: one set of tokens for all heads and all following layers, a fixed part of it the most recent ones.

Of a budget of K tokens m = floor(rho K) are chosen and the rest are the first `sinks` and the most recent ones. In the selecting layers,
which are dense themselves, each query head h ranks the tokens in between by q_h.k_j; the ranks are read in turn,

    rank 0 of every head, rank 1 of every head, ...

and the first m different tokens of that reading, with the sinks and the recent ones, are what every head of every following layer reads in
this step: K tokens exactly, loaded once.

Source: less-is-more, arXiv 2508.07101, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.parts.heads import interleave_ranks
from saccade.parts.pick import pick_best, read_tokens
from saccade.parts.planner import Planner, check_place, layer_at, role_of


@register
@dataclass(frozen=True, kw_only=True)
class LessIsMore(Planner):
    """budget: tokens K read per step by the layers that follow (int; 1K to 6K in the paper), or their share of the cache (float).
    rho: the share of K that the heads choose; the rest is for the most recent tokens and the sinks.
    sinks: first tokens that are always read, out of the recent part; none where that is smaller.
    start: the first layer that selects; those before it are dense.
    correction: the layer that selects again, by number (int) or as a share of the depth (float): 12 of 36 in the paper's Qwen3-8B, 20 in
        Qwen3-4B. None: no second selection.
    """

    budget: float | int = 2048
    rho: float = 0.75
    sinks: int = 4
    start: int = 2
    correction: float | int | None = 0.33

    info = Info(
        slug="less-is-more", phase="decode", reads_encoded=True, recordable=True, opened={"budget": 1.0},
        tiny={"budget": 0.25, "start": 0, "correction": None},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("sinks", "start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"less-is-more got {name}={value!r}: expected a whole number of at least 0")
        if isinstance(self.rho, bool) or not isinstance(self.rho, int | float) or not 0 <= self.rho <= 1:
            raise ValueError(f"less-is-more got rho={self.rho!r}: expected the share of the budget that is chosen, in [0, 1]")
        if self.correction is not None:
            check_place("less-is-more", "correction", self.correction)
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("less-is-more reads a fixed number of tokens: its budget is a ratio or a number of tokens")

    def role(self, ctx: LayerContext) -> LayerPolicy:
        full = set(range(self.start + 1))
        if self.correction is not None:
            full.add(max(self.start, layer_at(self.correction, ctx.layers)))
        return role_of(ctx.layer, ctx.layers, full)

    def reads_all(self, n: int) -> bool:
        return Budget.of(self.budget).tokens(n) >= n

    def parts(self, n: int) -> tuple[int, int, int]:
        """How many tokens of n are sinks, chosen and recent; together the budget."""
        tokens = Budget.of(self.budget).tokens(n)
        chosen = int(tokens * self.rho)
        recent = tokens - chosen
        sinks = self.sinks if recent >= self.sinks else 0
        return sinks, chosen, recent - sinks

    def choose(self, ctx: LayerContext, logits: Tensor) -> Selection:
        n = logits.shape[-1]
        sinks, chosen, recent = self.parts(n)
        places = torch.arange(n, device=logits.device).expand(logits.shape[0], 1, n)
        ids = [places[..., :sinks], places[..., n - recent :]]
        if chosen:
            turns = interleave_ranks(logits[..., sinks : n - recent], chosen)
            ids.insert(1, sinks + pick_best(turns, chosen))
        return read_tokens(torch.cat(ids, dim=-1), n)
