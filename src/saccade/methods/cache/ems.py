"""EMS: rank entries by global and local attention together, keep the best as class centres, merge the next ones into them, drop the rest.

    s_glo[j] = attention received from all queries,  s_loc[j] = from the newest w;  s = max(s_glo mean(s_loc) / mean(s_glo), s_loc)

Per head the N best entries by s, the newest w among them, are centres; the next N_tbm are to be merged; the others go. An entry x that
is to be merged is compared with the centres,

    r(x, c) = cos(k_x, k_c) cos(v_x, v_c), both cosines positive,

and joins the class of the largest r, or, where that is below tau, a class of zeros: it is evicted. So every head decides for itself how
much is merged while all keep N entries. A centre becomes the mean of its class weighted by s: values as they are, keys as unit
directions with their norms averaged apart. Merged entries stay at the centre's position.

Source: ems, arXiv 2412.08521. The paper leaves open and is read here: the maximum of the two scores, tau, N_tbm = N, w. While decoding
the sums run on, and each step over the budget merges or drops one entry; a centre keeps the sum it had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.state import Scope
from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.accumulated import accumulate, accumulated
from saccade.parts.mass_sums import mass_sums
from saccade.parts.merging import (
    check_mergeable,
    drop,
    fold,
    fold_directions,
    merge_entries,
    normalised,
    to_nearest,
)
from saccade.parts.ragged import ranks
from saccade.parts.recent_queries import GUESSES, recall, remember

WINDOW = "window"  # the state of the newest queries, apart from those that wait to be summed


@register
@dataclass(frozen=True, kw_only=True)
class EMS(CachePolicy):
    """Keeps `budget` class centres a head.

    budget: N, a number of tokens or a share of the tokens seen. window: w, the newest tokens: their queries make the local score and
    their entries always stay, out of the budget. merged: N_tbm as a multiple of N. threshold: tau in [-1, 1]; above 1 nothing is merged.
    weigh_counts: a centre enters the softmax as many times as it has tokens.
    """

    budget: float | int = 256
    window: int = 32
    merged: float = 1.0
    threshold: float = 0.6
    weigh_counts: bool = False

    info = Info(
        slug="ems", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False,
        opened={"budget": 1.0}, tiny={"budget": 0.4, "window": 8, "threshold": 0.2},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"ems(budget={amount}) is not a fixed number: give a ratio or a number of tokens")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"ems(window={self.window!r}) has no local score: give at least 1 token")
        if self.merged < 0:
            raise ValueError(f"ems(merged={self.merged!r}) is not a multiple of the budget: give a number of at least 0")
        if not isinstance(self.weigh_counts, bool):
            raise ValueError(f"ems(weigh_counts={self.weigh_counts!r}) is neither True nor False")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        check_mergeable("ems", ctx, kv)
        accumulate(ctx, kv, q)
        remember(ctx.state.setdefault(WINDOW, Scope()), q, ctx.seen, self.window + GUESSES)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > Budget.of(self.budget).tokens(ctx.seen)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        count = Budget.of(self.budget).tokens(ctx.seen)
        if count >= kv.length:
            return
        mass, queries = accumulated(ctx, kv), recall(ctx.state.get(WINDOW, {}), ctx.seen)
        local = torch.zeros_like(mass)
        if queries is not None:
            local = mass_sums(queries[:, :, -self.window :], kv.keys, scale=ctx.scale, softcap=ctx.softcap, valid=kv.valid)
        scores = global_local(mass, local, kv.valid)
        place = ranks(scores, count, recent=self.window, valid=kv.valid)
        real = torch.ones_like(place, dtype=torch.bool) if kv.valid is None else kv.valid
        stay, next_best = real & (place < count), real & (place >= count) & (place < count + int(count * self.merged))
        into, similarity = to_nearest(stay, next_best, kv.keys, kv.values)
        into = drop(into, next_best & (similarity < self.threshold))
        weights = normalised(scores, into)
        folded = fold_directions(kv.keys, into, weights), fold(kv.values, into, weights)
        merge_entries(kv, into, *folded, weigh=self.weigh_counts)


def global_local(mass: Tensor, local: Tensor, valid: Tensor | None = None) -> Tensor:
    """s of each entry, `(B, H, n)`: the larger of the two scores when the global one has been given the mean of the local one."""
    if valid is not None:
        mass, local = mass * valid, local * valid
    mean = mass.sum(-1, keepdim=True)
    aligned = mass * (local.sum(-1, keepdim=True) / mean.clamp(min=torch.finfo(mass.dtype).tiny))
    return torch.maximum(aligned, local)
