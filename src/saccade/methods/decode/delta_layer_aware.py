"""DELTA: a few layers attend to everything and pick pages by their own attention map; the layers after them read only these pages.

In a planner layer, with the attention p_hj of the query over all keys j,

    s_j = max_h p_hj        S_page = sum_{j in page} s_j

and the B pages with the highest S, the last L pages always among them, are what all heads of the layers up to the next planner read. The
maximum over heads comes first: a token that one head alone needs counts in full. While the cache has no more than B pages every layer
reads all of it. Nothing is dropped, and every step picks anew.

Planners stand where attention changes. A calibration measures 1 - cos(map of layer l - 1, map of layer l) on text and puts planners at its
peaks, spread over the depth; without one they stand where the paper has them, by share of the depth.

Source: delta-layer-aware, arXiv 2510.09883, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Calibrated, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import pooled_probabilities
from saccade.parts.chunks import separated_peaks
from saccade.parts.heads import reduce_heads
from saccade.parts.page_mass import best_pages, page_sums
from saccade.parts.pick import read_pages
from saccade.parts.planner import Planner, check_place, found_role, layer_at, planned_roles, role_of

DENSE = (0, 1, 2, 0.5, 0.786)  # layers 0, 1, 2, 14 and 22 of 28 in the paper's DeepSeek-R1-Distill-Qwen-7B
TILES = 256  # rows and columns to which a calibration's attention maps are pooled at most


@register
@dataclass(frozen=True, kw_only=True)
class DeltaLayerAware(Planner, Calibrated):
    """page_size: tokens per page.
    budget: tokens read per step by the layers that follow a planner (int), or their share of the cache (float): B whole pages.
    recent_pages: last pages that are always read, L; out of the budget.
    ratio: layers follow once the cache has more than ratio * B pages.
    dense: the layers that read everything, by number (int) or as a share of the depth (float); the last one before each gap plans. None:
        what a calibration found, or without one layers 0, 1, 2 and those at 0.5 and 0.786 of the depth.
    planners: how many planners a calibration places, the first of them at layer `first`, before which all layers are dense.
    """

    page_size: int = 16
    budget: float | int = 1024
    recent_pages: int = 8
    ratio: float = 1.0
    dense: tuple[int | float, ...] | None = None
    planners: int = 3
    first: int = 2

    info = Info(
        slug="delta-layer-aware", phase="decode", reads_encoded=True, opened={"budget": 1.0},
        tiny={"page_size": 4, "budget": 0.25, "recent_pages": 2, "dense": (0,)},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("page_size", 1), ("recent_pages", 1), ("planners", 1), ("first", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"delta-layer-aware got {name}={value!r}: expected a whole number of at least {least}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int | float) or self.ratio < 1:
            raise ValueError(f"delta-layer-aware got ratio={self.ratio!r}: expected a number of at least 1")
        if self.dense is not None:
            if not isinstance(self.dense, tuple) or not self.dense:
                raise ValueError(f"delta-layer-aware got dense={self.dense!r}: expected a tuple of layers such as (0, 1, 2, 0.5), or None")
            for place in self.dense:
                check_place("delta-layer-aware", "dense", place)
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("delta-layer-aware reads a fixed number of pages: its budget is a ratio or a number of tokens")

    # -- who plans ---------------------------------------------------------------------------------------------------------

    def role(self, ctx: LayerContext) -> LayerPolicy:
        if self.dense is None and ctx.plan is not None:
            return found_role(ctx)
        return role_of(ctx.layer, ctx.layers, {layer_at(place, ctx.layers) for place in self.dense or DENSE})

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """How far the mean map of the heads, pooled to tiles of whole pages, turned away from that of the layer before."""
        tile = self.page_size * math.ceil(k.shape[2] / (self.page_size * TILES))
        pooled = pooled_probabilities(q, k, tile, tile, scale=ctx.scale, softcap=ctx.softcap).mean(1).flatten(1).double()
        before = ctx.shared.get("map", pooled)
        ctx.shared["map"] = pooled
        change = (1 - torch.cosine_similarity(before, pooled, dim=-1)).clamp(min=0)
        return {"change": change.sum(), "samples": torch.tensor(float(q.shape[0]))}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.conclude_all({0: sums})[0]

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """role: who plans and who follows whom; change: 1 - cos to the layer before, which says why."""
        layers = sorted(sums)
        change = torch.stack([sums[layer]["change"].cpu() / sums[layer]["samples"].cpu() for layer in layers])
        first = min(self.first, len(layers) - 1)
        offered = change.clone()
        offered[: first + 1] = -torch.inf
        apart = max(1, len(layers) // (self.planners + 1))
        peaks = separated_peaks(offered[None], apart, self.planners - 1, torch.tensor([first]))
        full = {*range(first), *peaks[0].nonzero()[:, 0].tolist()}
        # models with other kinds of layers in between count only those that were measured
        named: dict[int, LayerPolicy] = {}
        for number, layer in enumerate(layers):
            role = role_of(number, len(layers), full)
            named[layer] = layers[role] if isinstance(role, int) else role
        return {layer: {**found, "change": change[i]} for i, (layer, found) in enumerate(planned_roles(named).items())}

    # -- what they pick ----------------------------------------------------------------------------------------------------

    def pages(self, n: int) -> int:
        """Pages B that a cache of n tokens may read."""
        tokens = Budget.of(self.budget).tokens(n)
        return math.ceil(n / self.page_size) if tokens >= n else max(1, tokens // self.page_size)

    def reads_all(self, n: int) -> bool:
        return math.ceil(n / self.page_size) <= self.ratio * self.pages(n)

    def choose(self, ctx: LayerContext, logits: Tensor) -> Selection:
        n = logits.shape[-1]
        scores = reduce_heads(logits.softmax(-1), ctx.layout.kv_heads, "max")
        chosen = best_pages(page_sums(scores, self.page_size), self.pages(n), self.recent_pages)
        return read_pages(chosen, self.page_size, n)
