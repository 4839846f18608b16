"""D2O: more cache for layers whose attention is spread out, and a second look at what is evicted: fold it into a survivor that is like
it, or drop it.

Layers. With s_h the column sums of the prompt's attention map in query head h and L layers that are compressed,

    f_l = mean over heads of minmax(Var_j s_h[j]),    ratio_l = L rho softmax_l(-f_l), within [0.01, 1]

(minmax maps the smallest head's variance to 0 and the largest to 1; spread-out attention has a low variance). Tokens. Each head keeps the
sinks, the newest and those with the largest accumulated attention. An evicted e finds its nearest survivor, u_e = max_c cos(k_e, k_c).
The threshold is the mean of u the first time and tau <- a tau + b mean(u) after that. With u averaged over heads, e is dropped where u <
tau; the others are folded with their survivors,

    k_c <- sum exp(u_e) / Z k_e + e / Z k_c,    Z = e + sum exp(u_e)          (weights="exponential")
    k_c <- (k_c + sum u_e k_e) / (1 + m)                                      (weights="cosine", as the published code does)

and v_c with the same weights. Runs when the prompt has ended and after every step over the budget.

Source: d2o, arXiv 2406.13035. Chosen here: what a layer's bounds leave over goes to the other layers, so that the cache has the size
asked for and rho = 1 keeps everything (rows of a batch have ratios of their own); heads evict different tokens, so u is averaged over
the i-th evicted entry of each head, oldest first, as in the published code; where the first layers compress before the last have seen
the prompt (`when="call"`), all wait for the next call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.parts.accumulated import accumulate, accumulated
from saccade.parts.allocation import share_out
from saccade.parts.column_spread import COLUMNS, column_spread, sums_by_head
from saccade.parts.layers import acting_layers, check_layers
from saccade.parts.merging import WEIGHTS, check_mergeable, drop, fold, merge_entries, to_nearest
from saccade.parts.ragged import slots_of, staying

LEAST = 0.01  # no layer keeps a smaller share
SPREAD, SEEN, RATIOS = "d2o spread", "d2o seen", "d2o ratios"  # in ctx.sequence; the first two by layer
TAU = "d2o threshold"  # in ctx.state


@register
@dataclass(frozen=True, kw_only=True)
class D2O(CachePolicy):
    """Keeps a share of the tokens that differs by layer, and folds part of the rest into it.

    budget: rho, the mean share of the tokens kept in the layers that are compressed, in [0.01, 1]. recent: the share of a layer's budget
    for the newest entries, the rest is for heavy hitters. sinks: first entries that always stay, out of the budget. keep_tau, new_tau: a
    and b. threshold: a fixed tau instead of the moving one (above 1 nothing is folded). weights: "exponential" or "cosine". skip_layers:
    layers left alone, -1 is the last.
    """

    budget: float = 0.2
    recent: float = 0.5
    sinks: int = 4
    keep_tau: float = 0.5
    new_tau: float = 0.5
    threshold: float | None = None
    weights: str = "exponential"
    skip_layers: tuple[int, ...] = (0, 1, -1)

    info = Info(
        slug="d2o", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False, ragged=True,
        opened={"budget": 1.0}, tiny={"budget": 0.4, "sinks": 2, "skip_layers": ()},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int | float) or not LEAST <= self.budget <= 1:
            raise ValueError(f"d2o(budget={self.budget!r}) is not a share of the tokens: give a number from {LEAST} to 1")
        if not 0 <= self.recent <= 1:
            raise ValueError(f"d2o(recent={self.recent!r}) is not a share of the budget: give a number from 0 to 1")
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"d2o(sinks={self.sinks!r}) is not a number of entries: give an integer of at least 0")
        if self.keep_tau < 0 or self.new_tau < 0:
            raise ValueError(f"d2o(keep_tau={self.keep_tau!r}, new_tau={self.new_tau!r}): both must be at least 0")
        if self.weights not in ("exponential", "cosine"):
            raise ValueError(f"d2o(weights={self.weights!r}) is not 'exponential' or 'cosine'")
        object.__setattr__(self, "skip_layers", check_layers("d2o", self.skip_layers))

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        if ctx.layer not in acting_layers(self.skip_layers, ctx.layers):
            return
        check_mergeable("d2o", ctx, kv)
        if RATIOS in ctx.sequence:
            ctx.state.pop(COLUMNS, None)
            accumulate(ctx, kv, q)
        else:
            accumulate(ctx, kv, q, lambda *given, **options: sums_by_head(ctx.state, *given, **options))
            ctx.sequence[f"{SPREAD} {ctx.layer}"] = column_spread(ctx, kv)
            ctx.sequence[f"{SEEN} {ctx.layer}"] = ctx.seen

    def due(self, ctx: LayerContext, length: int) -> bool:
        counts = self._counts(ctx)
        return counts is not None and length > int(counts.min())

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        counts = self._counts(ctx)
        if counts is None or kv.length <= int(counts.min()):
            return
        counts = counts[:, None, None].to(kv.keys.device)
        recent = (counts * self.recent).long()
        stay = staying(accumulated(ctx, kv), counts, sinks=self.sinks, recent=recent, valid=kv.valid)
        leaving = ~stay if kv.valid is None else kv.valid & ~stay
        into, similarity = to_nearest(stay, leaving, kv.keys)
        alike, mean = _over_heads(similarity, leaving)
        tau = self._threshold(ctx, mean)
        into = drop(into, leaving & (alike < tau[:, None, None]))
        weights = WEIGHTS[self.weights](into, similarity)
        merge_entries(kv, into, fold(kv.keys, into, weights), fold(kv.values, into, weights))

    def _counts(self, ctx: LayerContext) -> Tensor | None:
        """Entries per head that this layer may hold now, int64 `(B,)`; None for layers left alone and while ratios are not settled."""
        layers = acting_layers(self.skip_layers, ctx.layers)
        if ctx.layer not in layers or not self._settled(ctx, layers):
            return None
        ratio = ctx.sequence[RATIOS][:, layers.index(ctx.layer)]
        # rounding first keeps the ceiling where a reader expects it
        return (ratio * ctx.seen * 1e9).round().div(1e9).ceil().long().clamp(min=1)

    def _settled(self, ctx: LayerContext, layers: list[int]) -> bool:
        """Settle the ratios of all layers once they have seen the same tokens."""
        if RATIOS in ctx.sequence:
            return True
        seen = {layer: ctx.sequence[f"{SEEN} {layer}"] for layer in layers if f"{SEEN} {layer}" in ctx.sequence}
        newest = seen.get(ctx.layer)
        if newest is None:  # a row of the batch that is all padding so far
            return False
        # layers come in order: a later one with as many tokens, or another number of tokens by now, says that the pass is over
        over = ctx.layer == layers[-1] or newest != ctx.seen or any(n == newest for layer, n in seen.items() if layer > ctx.layer)
        if not over or any(n != newest for n in seen.values()):
            return False
        taken_back = max(0, newest - ctx.seen)
        spread = torch.stack([ctx.sequence[f"{SPREAD} {layer}"][:, taken_back] for layer in seen], dim=-1)
        found = share_out(torch.softmax(-spread, dim=-1), self.budget, least=LEAST)
        ratios = torch.ones(found.shape[0], len(layers), dtype=torch.float64, device=found.device)
        # layers that the model keeps to itself never ask
        ratios[:, [layers.index(layer) for layer in seen]] = found
        ctx.sequence[RATIOS] = ratios
        return True

    def _threshold(self, ctx: LayerContext, mean: Tensor) -> Tensor:
        """tau of each row, `(B,)`, and what is remembered of it."""
        if self.threshold is not None:
            return torch.full_like(mean, self.threshold)
        known = ctx.state.get(TAU)
        ctx.state[TAU] = mean if known is None else self.keep_tau * known + self.new_tau * mean
        return ctx.state[TAU]


def _over_heads(similarity: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """For each leaving entry the mean similarity of the entries with its number among those leaving, over heads `(B, H, n)`; and the
    mean of all, `(B,)`."""
    slots, counts = slots_of(leaving)
    there = torch.arange(slots.shape[-1], device=slots.device) < counts.unsqueeze(-1)
    own = similarity.gather(-1, slots) * there
    mean = own.sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
    filled = torch.where(there, mean.expand_as(own), similarity.gather(-1, slots))
    return similarity.scatter(-1, slots, filled), own.sum((1, 2)) / there.sum((1, 2)).clamp(min=1)
