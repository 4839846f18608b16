"""MoA: every head has its own span, a linear function of the length, chosen by what the loss says of the keys it would lose.

    span_h(n) = alpha_h + beta_h n;   query i reads key j <= i  iff  j lies in the first block or floor(i/b) - floor(j/b) < span_h / b

Offline, one dense forward and backward pass a sample gives the loss change E_ij of losing key j in row i (`parts/static/removal.py`).
Summed over tiles, averaged over samples, its absolute value over the tiles that a rule masks is the rule's loss in a head, at each
length sampled. One rule a head is then chosen so that the mean density stays within the bound at every length, at most two rules a
layer; of the Pareto set over the shorter lengths, the plan with the least predicted loss at the longest one is taken (the paper runs
the model for this). The paper's lower bound on density, 0.9 of the bound, only shortens its search and is not imposed.

As a prefill method it reads those spans; `cache="moa"` beside it keeps for each head the first block and a ring of its span, sized for
the length of the prompt or `max_length`. Heads of a group share a rule: the loss of a group is that of its most affected head.

Source: moa, arXiv 2406.14909, sections 3 and 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import CachePolicy, Info, LayerContext, Prefill, Selection, StoredKV, register
from saccade.parts.static import Pattern, compile_pattern, sink, window
from saccade.parts.static.assign import assign_rules
from saccade.parts.static.decoder import check_sizes
from saccade.parts.static.gradient import GradientCalibrated
from saccade.parts.static.keepset import drop_unneeded, note_places
from saccade.parts.static.removal import removal_by_tile
from saccade.parts.static.spans import rule_costs, rule_losses, span_rules


@register
@dataclass(frozen=True, kw_only=True)
class MoA(Prefill, CachePolicy, GradientCalibrated):
    """bound: mean density over all heads that no length may exceed, in (0, 1]; 1 reads everything. block: tokens a block (b); the
    first block is read by all. alpha_step, alpha_max: tokens; alpha runs in such steps up to alpha_max, from minus the shortest
    sample's length. betas: how many slopes between 0 and 1. rules_per_layer: different rules in a layer. answer: share of a
    sample, at its end, that is the model's answer: the loss is taken there only. max_length: tokens that a request may reach, for
    spans of the cache; None: those of the prompt.
    """

    bound: float = 0.5
    block: int = 64
    alpha_step: int = 1024
    alpha_max: int = 8192
    betas: int = 9
    rules_per_layer: int = 2
    answer: float = 0.25
    max_length: int | None = None

    info = Info(
        slug="moa", phase="prefill", needs=frozenset({"calibration"}), opened={"bound": 1.0},
        tiny={"block": 8, "alpha_step": 16, "alpha_max": 64, "betas": 3},
        opts_out={
            "chunked": "a span depends on the length of the prompt, of which a chunk knows what has come so far",
            "stepwise": "single tokens read what the cache holds, only a prompt that comes at once is read sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes(
            "moa", block=self.block, alpha_step=self.alpha_step, alpha_max=self.alpha_max, betas=self.betas,
            rules_per_layer=self.rules_per_layer, max_length=1 if self.max_length is None else self.max_length,
        )  # fmt: skip
        for name in ("bound", "answer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"moa({name}={value!r}) is not a share above 0 and at most 1")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def loss_tokens(self, n: int) -> int:
        return math.ceil(self.answer * n)

    def measure_gradient(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
        effect = removal_by_tile(q, k, v, d_out, scale=ctx.scale, softcap=ctx.softcap, block=self.block)
        n = k.shape[2]
        return {f"effect.{n}": effect, f"samples.{n}": torch.tensor(float(q.shape[0]))}

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        lengths = sorted(int(name.split(".")[1]) for name in next(iter(sums.values())) if name.startswith("effect."))
        rules = span_rules(lengths[0], self.alpha_step, self.alpha_max, self.betas)
        losses = [rule_losses(found, lengths, rules, self.block) for found in sums.values()]
        # the paper bounds density at a length beyond the sampled ones too
        costs = rule_costs(rules, [*lengths, 2 * lengths[-1]], self.block)
        aims = slice(0, max(1, len(lengths) - 1))
        plans = assign_rules([x[..., aims] for x in losses], costs, self.bound, rules_per_layer=self.rules_per_layer)
        heads = torch.arange(plans.rules.shape[2])
        unseen = sum(x[heads, plans.rules[:, layer], -1].sum(1) for layer, x in enumerate(losses))
        best = plans.rules[int(torch.as_tensor(unseen).argmin())]
        return {layer: {"alpha": rules[best[i], 0], "beta": rules[best[i], 1]} for i, layer in enumerate(sums)}

    # -- reading -----------------------------------------------------------------------------------------------------------

    def pattern(self, ctx: LayerContext, n: int) -> Pattern:
        """The pattern of this layer's heads in a sequence of n tokens."""
        span = (ctx.found("alpha").double() + ctx.found("beta").double() * n).clamp(min=1, max=n)
        blocks = tuple(math.ceil(x / self.block) for x in span.tolist())
        return sink(1, block=self.block) | window(blocks, block=self.block)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        block_q = math.gcd(self.block, n_k - n_q)
        return compile_pattern(self.pattern(ctx, n_k), n_q, n_k, block_q=block_q, block_k=self.block, device=q.device).selection

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self.bound == 1:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        note_places(ctx, kv, q.shape[2])

    def due(self, ctx: LayerContext, length: int) -> bool:
        # entries go block by block: when a step has filled one up, or guesses that were taken back had
        return self.bound < 1 and ctx.state.get("served", 0) // self.block != ctx.seen // self.block

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if self.bound == 1:
            return
        ctx.state["served"] = ctx.seen
        n = ctx.state.setdefault("length", max(self.max_length or 0, ctx.seen))
        drop_unneeded(ctx, kv, self.pattern(ctx, n))
