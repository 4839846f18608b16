"""Squeezed Attention: the keys of a fixed prompt are clustered once; a step loads those whose keys get more than a share of attention.

When the prompt has ended, all its keys but the last W are clustered by direction (k-means of normalised keys); a centroid C_i is the mean
of its N_i keys as they are. The estimated attention share of each key of cluster i, and what is read of the prompt:

    S_i = exp(scale q.C_i) / sum_j N_j exp(scale q.C_j),      read cluster i  iff  S_i > T

and the last W prompt tokens and all that follow are read anyway, in one softmax. T is the same for all layers and heads, so that
concentrated heads read little and flat ones much: it is the quantile of S over the keys of all layers and heads for the prompt's last W
queries that makes `budget` of the keys pass on average. With a hierarchy, centroids are clustered again; a first pass over the coarse
ones (threshold T_1) leaves some fine clusters, among which the second pass takes its shares (T_2).

Each layer measures its shares in the first decoding step, which is read densely (with a hierarchy: the first two), because T needs all
layers; a given threshold makes that needless. Where the prompt was read before the method was there, that step's query stands in for
the last W. Tokens of later turns are not clustered, and many at a time are read densely.
Source: squeezed-attention, arXiv 2411.09688.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Decode, Info, LayerContext, Prefill, Selection, register
from saccade.parts.clusters import cluster_means, kmeans
from saccade.parts.ends import read_with_tail
from saccade.parts.lists import hits
from saccade.parts.picked import picked_dots
from saccade.parts.shares import by_query_head, centroid_logits, key_shares, share_histogram, share_quantile

SLACK = 64  # queries kept beyond W: guessed tokens at a prompt's end may be taken back


@register
@dataclass(frozen=True, kw_only=True)
class SqueezedAttention(Decode, Prefill):
    """budget: share of the prompt's clustered keys that pass on average over layers and heads, in (0, 1].
    threshold: T instead, a share of attention from 0 on; 0 reads every key. window: last prompt tokens W, always read, whose queries set T.
    clusters: centroids as a share of the clustered keys. iterations: of k-means at most.
    coarse: coarse centroids as a share of the clustered keys, for the hierarchy; None: no hierarchy. coarse_budget: share of the keys
        that pass the first pass, at least the budget. coarse_threshold: T_1 instead.

    The index are tensors in the layer's state: "fine" centroids `(B, Hk, c, D)` float32, "fine_counts" `(B, Hk, c)`, the "labels" of the p
    clustered keys `(B, Hk, p)`; with a hierarchy "coarse", "coarse_counts" and the "parents" of fine centroids `(B, Hk, c)`; and the
    prompt's last "queries" `(B, Hq, W, D)`. Histograms of the shares are in the sequence's state, which all layers read.
    """

    budget: float = 0.3
    threshold: float | None = None
    window: int = 100
    clusters: float = 0.05
    iterations: int = 300
    coarse: float | None = None
    coarse_budget: float = 0.5
    coarse_threshold: float | None = None

    info = Info(
        slug="squeezed-attention", phase="decode", also=frozenset({"prefill"}), opened={"threshold": 0.0},
        tiny={"budget": 0.3, "window": 8, "clusters": 0.25},
        opts_out={
            "stepwise": "a prompt at once is read densely, tokens that come one by one are decoded sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("budget", "clusters", "coarse", "coarse_budget"):
            value = getattr(self, name)
            if name == "coarse" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"squeezed-attention({name}={value!r}) is not a share above 0 and at most 1")
        for name in ("threshold", "coarse_threshold"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf):
                raise ValueError(f"squeezed-attention({name}={value!r}) is neither None nor a share from 0 on")
        for name in ("window", "iterations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"squeezed-attention({name}={value!r}) is not a whole number of at least 1")
        if self.coarse is not None and (self.coarse > self.clusters or self.coarse_budget < self.budget):
            raise ValueError(
                f"squeezed-attention(coarse={self.coarse}, coarse_budget={self.coarse_budget}): a first pass has fewer centroids than "
                f"the second ({self.clusters}) and lets at least the budget ({self.budget}) pass"
            )

    # -- the prompt --------------------------------------------------------------------------------------------------------

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ctx.phase == "decode":
            return Decode.attend(self, ctx, q, k, v)
        # a prompt is read densely; its last queries will set the threshold
        queries, end = self._name("queries", ctx), self._name("end", ctx)
        before = ctx.sequence[queries] if ctx.sequence.get(end) == ctx.seen - q.shape[2] else q[:, :, :0]
        ctx.sequence[queries] = torch.cat([before, q], dim=2)[:, :, -self.window - SLACK :].clone()
        ctx.sequence[end] = ctx.seen
        return ctx.attend(q, k, v, None)

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        if start:
            return  # what follows the prompt is read as it is
        self._forget(ctx)
        state, prefix = ctx.state, max(0, k.shape[2] - 1 - self.window)
        state["labels"] = torch.zeros(*k.shape[:2], prefix, dtype=torch.int64, device=k.device)
        if not prefix:
            return
        # the same numbers whatever the length, so that a run and its replay agree
        generator = replace(ctx, seen=0).generator()
        keys = k[:, :, :prefix].to(torch.promote_types(k.dtype, torch.float32))
        count, few = (max(1, round(share * prefix)) for share in (self.clusters, self.coarse or 0.0))
        state["labels"] = kmeans(F.normalize(keys, dim=-1), count, generator=generator, iterations=self.iterations).labels
        state["fine"], state["fine_counts"] = _means(keys, state["labels"], count)
        if self.coarse is not None:
            points, counts = F.normalize(state["fine"], dim=-1), state["fine_counts"]
            state["parents"] = kmeans(points, few, generator=generator, weights=counts, iterations=self.iterations).labels
            state["coarse"], state["coarse_counts"] = _means(state["fine"], state["parents"], few, counts)
        if (queries := ctx.sequence.get(self._name("queries", ctx))) is not None:
            # without the queries of tokens that were taken back
            taken_back = max(0, ctx.sequence[self._name("end", ctx)] - (ctx.seen - 1))
            state["queries"] = queries[:, :, : queries.shape[2] - taken_back][:, :, -self.window :].clone()

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if "labels" in ctx.state and n >= ctx.state["labels"].shape[2] + self.window:
            return n
        self._forget(ctx)
        return 0

    def _forget(self, ctx: LayerContext) -> None:
        ctx.state.clear()
        for level in ("coarse", "fine"):
            ctx.sequence.pop(self._name(level, ctx), None)

    def _name(self, what: str, ctx: LayerContext) -> str:
        return f"squeezed {what} {ctx.layer}"

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n, prefix = k.shape[2], ctx.state["labels"].shape[2] if "labels" in ctx.state else 0
        chosen = self._choose(ctx, q, n - 1 - prefix - self.window) if prefix else None
        if chosen is None:
            return Selection.full(q.shape[2], n, block_q=1, block_k=n, device=q.device)
        labels = ctx.state["labels"].unsqueeze(2).expand(-1, -1, ctx.layout.group, -1)  # of a key head, for its query heads
        ids = hits(ctx.layout.to_groups(chosen).gather(-1, labels).flatten(1, 2))
        return read_with_tail(ids.masked_fill(ids >= prefix, n), prefix, n)

    def _choose(self, ctx: LayerContext, q: Tensor, step: int) -> Tensor | None:
        """Which clusters each query head reads, bool `(B, Hq, c)`; None while shares are measured. step: of the generated tokens."""
        alive = None
        if self.coarse is not None:
            limit = self._limit(ctx, q, "coarse", None, step)
            if limit is None:
                return None
            alive, step = limit, step - (self.coarse_threshold is None)
        limit = self._limit(ctx, q, "fine", alive, step)
        if limit is None:
            return None
        shares = self._shares(ctx, q, "fine", None if alive is None else self._survivors(ctx, q, alive))
        return (shares > limit).squeeze(2)

    def _limit(self, ctx: LayerContext, q: Tensor, level: str, coarse_limit: Tensor | None, step: int) -> Tensor | None:
        """log of a pass's threshold, `(B, 1, 1, 1)`; None in the step in which its shares are measured."""
        coarse = level == "coarse"
        given = self.coarse_threshold if coarse else self.threshold
        if given is not None:
            return torch.full((1, 1, 1, 1), math.log(given) if given else -torch.inf, device=q.device)
        if step <= 0:
            queries = ctx.state.get("queries", q)
            queries = queries if queries.shape[2] else q
            survivors = None if coarse_limit is None else self._survivors(ctx, queries, coarse_limit)
            shares = self._shares(ctx, queries, level, survivors)
            ctx.sequence[self._name(level, ctx)] = share_histogram(shares, ctx.state[f"{level}_counts"])
            return None
        # what was measured is the same for all layers of a step
        found = ctx.shared.get(f"squeezed {level}")
        if found is None:
            measured = [x for name, x in ctx.sequence.items() if name.startswith(f"squeezed {level} ")]
            found = share_quantile(measured, self.coarse_budget if coarse else self.budget).view(-1, 1, 1, 1)
            ctx.shared[f"squeezed {level}"] = found
        return found

    def _survivors(self, ctx: LayerContext, q: Tensor, limit: Tensor) -> Tensor:
        """Fine clusters whose coarse cluster passes, bool `(B, Hq, N, c)`."""
        passed = self._shares(ctx, q, "coarse") > limit
        parents = ctx.state["parents"].repeat_interleave(ctx.layout.group, dim=1).unsqueeze(2)
        return passed.gather(-1, parents.expand(-1, -1, q.shape[2], -1))

    def _shares(self, ctx: LayerContext, q: Tensor, level: str, alive: Tensor | None = None) -> Tensor:
        """log S `(B, Hq, N, c)` of the clusters of a level, -inf for those that are not alive; shares are among those that are."""
        centroids, counts = ctx.state[level], ctx.state[f"{level}_counts"]
        if alive is not None and q.shape[2] == 1:
            # only the centroids that are alive are read
            ids = hits(alive.squeeze(2))
            found = picked_dots(q.squeeze(2), centroids, ids.clamp(max=centroids.shape[2] - 1).long()) * ctx.scale
            room = found.new_full((*alive.shape[:2], alive.shape[3] + 1), -torch.inf)  # one more, where lists past their end point
            logits = room.scatter(-1, ids.long(), found)[..., :-1].unsqueeze(2)
        else:
            logits = centroid_logits(q, centroids, ctx.scale)
            logits = logits if alive is None else logits.masked_fill(~alive, -torch.inf)
        return key_shares(logits.masked_fill(by_query_head(counts, logits) == 0, -torch.inf), counts)


def _means(points: Tensor, labels: Tensor, count: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means `(B, H, count, D)` of points `(B, H, n, D)` by label and the sums of their weights (default 1), `(B, H, count)`."""
    flat = None if weights is None else weights.flatten(0, 1)
    found = cluster_means(points.flatten(0, 1), labels.flatten(0, 1), count, flat)
    means, sums = (part.unflatten(0, points.shape[:2]) for part in found)
    return means, sums
