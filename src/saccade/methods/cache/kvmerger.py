"""KVMerger: neighbouring tokens have similar keys, so merge runs of them around their most attended member.

In each head, from the last entry to the first, entry i joins the set of entry i + 1 if cos(k_i, k_{i+1}) > eps and neither is protected
(the entries with the most accumulated attention, and the newest); else it opens a new set. A set S with pivot p, its member with the
most attention, becomes one entry at p's position:

    g_i = exp(-|k_p - k_i|^2 / (2 sigma^2)),  w_i = g_i / sum_S g,  k = sum_S w_i k_i,  v = sum_S w_i v_i

How much is left follows from the keys, and differs by head. With a budget, each layer takes the eps at which its heads together keep
that many.

Source: kvmerger, arXiv 2407.08454. Not given there and chosen here: how many heavy hitters and newest entries are protected. A merged
entry weighs like one token in the softmax, as in the paper, unless `weigh_counts` is set; how many tokens it stands for is in
`kv.side["count"]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Budget, CachePolicy, Info, LayerContext, Mass, StoredKV, Threshold, register
from saccade.parts.accumulated import accumulate, accumulated
from saccade.parts.layers import acting_layers, check_layers
from saccade.parts.merging import check_mergeable, class_sums, fold, gaussian, merge_entries
from saccade.parts.ragged import staying


@register
@dataclass(frozen=True, kw_only=True)
class KVMerger(CachePolicy):
    """Merges runs of similar keys when a prompt has ended; generated tokens are appended as they are.

    threshold: eps, a cosine; above 1 nothing is merged. budget: entries per head on average over a layer's heads, a share of the tokens
    seen or a number of tokens, instead of the threshold; None goes by the threshold. Protected entries may hold more. sigma: width of
    the kernel, in units of the keys. heavy, recent: shares of the entries that are protected for their attention, and as the newest.
    scale_values: multiplies merged values by the size of their set, as one formula of the paper does. weigh_counts: an entry
    enters the softmax as many times as it has tokens, its logit + log(count). skip_layers: layers left alone, -1 is the last.
    """

    threshold: float = 0.75
    budget: float | int | None = None
    sigma: float = 5.0
    heavy: float = 0.1
    recent: float = 0.1
    scale_values: bool = False
    weigh_counts: bool = False
    skip_layers: tuple[int, ...] = (0, 1, -1)

    info = Info(
        slug="kvmerger", phase="cache", needs=frozenset({"queries", "weights"}), frees_memory=True, append_only=False, ragged=True,
        opened={"threshold": 1.1, "budget": None}, tiny={"budget": 0.5, "skip_layers": ()},
        opts_out={"stepwise": "compresses when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.budget is not None and isinstance(amount := Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError(f"kvmerger(budget={amount}) is not a fixed number: give a ratio, a number of tokens or None")
        if not self.sigma > 0:
            raise ValueError(f"kvmerger(sigma={self.sigma!r}) is not a width: give a number above 0")
        if min(self.heavy, self.recent) < 0 or self.heavy + self.recent > 1:
            raise ValueError(f"kvmerger(heavy={self.heavy!r}, recent={self.recent!r}) are no two shares: give two with a sum up to 1")
        for name in ("scale_values", "weigh_counts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"kvmerger({name}={getattr(self, name)!r}) is neither True nor False")
        object.__setattr__(self, "skip_layers", check_layers("kvmerger", self.skip_layers))

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        if ctx.layer in acting_layers(self.skip_layers, ctx.layers):
            check_mergeable("kvmerger", ctx, kv)
            accumulate(ctx, kv, q)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if ctx.layer not in acting_layers(self.skip_layers, ctx.layers) or kv.length < 2:
            return
        mass = accumulated(ctx, kv)
        links = self._links(ctx, kv, mass)
        if not bool(links.any()):
            return
        into = pivots(links, mass)
        if kv.valid is not None:
            into = into.masked_fill(~kv.valid, kv.length)
        weights = gaussian(into, kv.keys, self.sigma)
        scale = class_sums(torch.ones_like(weights), into) if self.scale_values else 1.0
        folded = fold(kv.keys, into, weights), fold(kv.values, into, weights * scale)
        merge_entries(kv, into, *folded, weigh=self.weigh_counts)

    def _links(self, ctx: LayerContext, kv: StoredKV, mass: Tensor) -> Tensor:
        """Whether an entry and the next one are in the same set, bool `(B, H, n - 1)`."""
        n = kv.length
        held = torch.tensor(n, device=mass.device) if kv.valid is None else kv.valid.sum(-1, keepdim=True)
        newest = (held * self.recent).long()
        protected = staying(mass, newest + (held * self.heavy).long(), recent=newest, valid=kv.valid)
        free = ~protected if kv.valid is None else kv.valid & ~protected
        free = free[..., 1:] & free[..., :-1]
        keys = kv.keys.to(torch.promote_types(kv.keys.dtype, torch.float32))
        cosines = F.cosine_similarity(keys[:, :, 1:], keys[:, :, :-1], dim=-1)
        if self.budget is None:
            return free & (cosines > self.threshold)
        # a link saves one entry: the most similar pairs of all heads of the layer are linked
        entries = held.expand(*mass.shape[:2], 1).sum((1, 2))
        wanted = entries - mass.shape[1] * Budget.of(self.budget).tokens(ctx.seen)
        cosines = cosines.masked_fill(~free, -torch.inf).flatten(1).unsqueeze(1)
        return free & staying(cosines, wanted.clamp(min=0)[:, None, None]).view_as(free)


def pivots(links: Tensor, mass: Tensor) -> Tensor:
    """The route of each entry to the pivot of its set, int64 `(B, H, n)`: the member with the largest mass `(B, H, n)`, ties to the
    lower."""
    n = mass.shape[-1]
    number = F.pad((~links).long().cumsum(-1), (1, 0))
    most = torch.full_like(mass, -torch.inf).scatter_reduce(-1, number, mass, "amax").gather(-1, number)
    slots = torch.arange(n, device=mass.device).expand_as(number)
    first = torch.full_like(number, n).scatter_reduce(-1, number, torch.where(mass == most, slots, n), "amin")
    return first.gather(-1, number)
