"""GemFilter: an early layer knows which tokens answer the question; run up to it, pick them, and run the whole model on these alone.

At layer r, with q of the last prompt token and all keys k (after the rotary embedding),

    score_j = sum_h q_h . k_{g(h), j},        averaged over `kernel` neighbouring positions (zeros beyond the ends)

The k tokens of highest score, in their order, are the new prompt, at positions 0 ... k - 1. Layers 0 ... r see all n tokens once and store
nothing; the cache holds k tokens in every layer. The cost is about r / L of a prefill and that of k tokens.

Source: gemfilter, arXiv 2409.17422, algorithm 1. Chosen here: the last token stays, out of the k, for its logits are what comes next; where
the caller asks for logits of more tokens (guesses to be verified) those stay on top; the choosing layer is given as a share of the depth
by default, since models differ. A later turn on the same cache is read whole. Dropped tokens have logits of 0. Beyond the paper, off by
default, for models that read bytes: `recent` keeps a question in one piece, `queries` and `weights` let all of it choose by attention
weights; raw products are ruled by the heads with the largest keys, whatever they look for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, PromptReduction, Threshold, register
from saccade.parts.pick import pick_best
from saccade.parts.window_votes import window_votes


@register
@dataclass(frozen=True, kw_only=True)
class GemFilter(PromptReduction):
    """budget: tokens of the new prompt (k), a number or a share of the prompt. at: the choosing layer r, a layer number, or a share of the
    layers in (0, 1) (the paper: 13 of 32 for Llama-3.1-8B, 19 of 40 for Mistral-Nemo, 19 of 32 for Phi-3.5-mini). kernel: positions that
    scores are averaged over (odd; 1 turns it off). recent: newest tokens that stay whatever their score, out of the k.
    queries: newest tokens whose scores add up. weights: "raw" inner products, or "softmax" attention weights.
    """

    budget: float | int = 1024
    at: float | int = 0.42
    kernel: int = 5
    recent: int = 1
    queries: int = 1
    weights: Literal["raw", "softmax"] = "raw"

    info = Info(
        slug="gemfilter", phase="prefill", needs=frozenset({"queries"}), frees_memory=True, append_only=False, opened={"budget": 1.0},
        tiny={"budget": 0.5, "at": 1, "kernel": 3},
        opts_out={
            "chunked": "the end of the whole prompt chooses what stays, and a chunk knows its own end only",
            "stepwise": "a prompt that comes token by token has no end that could choose",
            "future": "the last token of a prompt decides which of its tokens are run at all",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"gemfilter keeps a fixed number of tokens, not {amount}: give a ratio or a number of tokens")
        share = isinstance(self.at, float) and 0 < self.at < 1
        if not share and (isinstance(self.at, bool) or not isinstance(self.at, int) or self.at < 0):
            raise ValueError(f"gemfilter(at={self.at!r}) is neither a layer number nor a share of the layers between 0 and 1")
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"gemfilter(kernel={self.kernel!r}) has no middle: give an odd number of positions such as 5")

        for name in ("recent", "queries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"gemfilter({name}={value!r}) is not a whole number of at least 1: the last token always counts")
        if self.weights not in ("raw", "softmax"):
            raise ValueError(f"gemfilter(weights={self.weights!r}) is not 'raw' or 'softmax'")

    def layer(self, layers: int) -> int:
        return int(self.at * layers) if isinstance(self.at, float) else self.at

    def size(self, n: int) -> int:
        return max(1, Budget.of(self.budget).tokens(n))

    def choose(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        newest, count = q[:, :, -self.queries :], self.size(k.shape[2])
        ctx.count(float(newest.shape[2] * k.shape[2]))
        if self.weights == "softmax":
            votes = window_votes(newest, k, scale=ctx.scale, softcap=ctx.softcap, kernel=self.kernel, behind=0)
            scores = votes.sum(1)
        else:
            exact = torch.promote_types(k.dtype, torch.float32)
            # the scores of a group add up to those of its summed query, and so do those of several queries
            queries = newest.to(exact).sum(2).unflatten(1, (k.shape[1], -1)).sum(2)
            scores = torch.einsum("bhd,bhnd->bn", queries, k.to(exact))
            scores = F.avg_pool1d(scores.unsqueeze(1), self.kernel, stride=1, padding=self.kernel // 2).squeeze(1)
        scores[:, -min(self.recent, count) :] = torch.inf
        return pick_best(scores, count)
