"""Quest: at every step read only the pages of the cache whose keys could match the query best.

For each page of S tokens and each key head the channel-wise minimum m and maximum M of its keys are kept. For a
query q

    U_p = sum_d max(q_d m_d, q_d M_d)  >=  q.k  for every key k of page p,

and exact attention runs over the pages with the highest U_p and over the page being written. Nothing is dropped: the
next query chooses anew. Source: quest, arXiv 2406.10774.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Decode, Info, LayerContext, Mass, Selection, Threshold, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import Reduce
from saccade.parts.heads import check_reduction
from saccade.parts.pages import PageBounds
from saccade.parts.pick import pick_best, read_pages

FEWEST = 3  # pages read at least


@register
@dataclass(frozen=True, kw_only=True)
class Quest(Decode):
    """page_size: tokens per page S; a page's bounds take the room of two keys: the index is 2 / S of the key cache.
    budget: tokens read per step and head (int), or their share (float) of the entries the layer holds, which are the
        tokens seen unless a cache policy drops some. Pages that fit in whole are read, at least 3.
    dense_layers: the first layers, which read everything (0 and 1 in the paper).
    reduce: "none" lets every query head choose its pages; "group_max" chooses once for the query heads that share a
        key head, by the highest bound among them, so that a page is loaded once (inferred: the paper has no grouped
        heads).
    """

    page_size: int = 16
    budget: float | int = 1024
    dense_layers: int = 2
    reduce: Reduce = "none"

    info = Info(
        slug="quest", phase="decode", reads_encoded=True, recordable=True, opened={"budget": 1.0},
        tiny={"page_size": 4, "budget": 0.25, "dense_layers": 0},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("page_size", 1), ("dense_layers", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"quest got {name}={value!r}: expected a whole number of at least {least}")
        if isinstance(Budget.of(self.budget).amount, Mass | Threshold):
            raise ValueError("quest reads a fixed number of pages: its budget is a ratio or a number of tokens")
        check_reduction("quest", self.reduce)

    def layer_policy(self, layer: int, layers: int) -> LayerPolicy:
        return "dense" if layer < self.dense_layers else "select"

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        ctx.state.setdefault("pages", PageBounds(self.page_size)).append(k)

    def rewind(self, ctx: LayerContext, n: int) -> int:
        return ctx.state["pages"].truncate(n) if "pages" in ctx.state else 0

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        pages: PageBounds = ctx.state["pages"]
        tokens = Budget.of(self.budget).tokens(pages.n)
        count = pages.pages if tokens >= pages.n else max(FEWEST, tokens // self.page_size)
        if count >= pages.pages:
            every = torch.arange(pages.pages, device=q.device)
            return read_pages(every[None, None], self.page_size, pages.n)
        bounds = pages.upper_bound(q.squeeze(2), self.reduce)
        bounds[..., -1] = torch.inf  # the page being written
        return read_pages(pick_best(bounds, count), self.page_size, pages.n)
