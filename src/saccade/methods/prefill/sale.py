"""SALE: every logit is estimated from 4-bit queries and keys, and a tile is read if one estimate is heavy beside the sink and local keys.

    k' = k - kbar,  q' = q - qbar,   s_ij = scale * (int4(q'_i).int4(k'_j) + qbar.k'_j + q_i.kbar)          every logit, estimated
    (out, lse)_i = attention of query i over the sink tile and its local keys                                    exact
    tile (64 queries x 32 keys) is read  iff  max_ij exp(s_ij - lse_i) > tau     i.e.  max_ij (s_ij - lse_i) > log tau

What is read is merged with the attention over sink and local keys. The threshold is relative to those keys alone, so it may exceed 1.
Offline, each head halves its threshold until its output is close enough (`saccade calibrate sale`). Decoding is dense.

Source: sale, arXiv 2505.24179, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Calibrated, Info, LayerContext, Partial, Prefill, Selection, merge, register
from saccade.core.tilemath import row_tiles
from saccade.ops.estimate import TileGrid, choose_threshold, tile_maxima
from saccade.parts.bisect import first_within, halvings
from saccade.parts.lists import run_tiles
from saccade.parts.placed import placed

CANDIDATES = halvings(0.008, 1e-4)  # thresholds that the calibration tries


@register
@dataclass(frozen=True, kw_only=True)
class SALE(Prefill, Calibrated):
    """Masks belong to query heads. The thresholds come from the plan, else all heads have `tau`.

    tau: weight of a key, relative to all of the sink and local keys together, from which its tile is read, >= 0; 0 reads everything.
    local: latest keys that every row reads at least, tokens; they are rounded out to the grid of `segment` tokens. sinks: first keys.
    block_q, block_k: queries and keys per tile; block_k divides sinks and segment. bits: of the estimate, 4 or 8. group: tokens that
    share a quantisation step; with a multiple of 8 a GPU has less to do, and the estimates are worse (errors of 0.16 at 32 for 0.11).
    dense_below: prompts of up to this many tokens are read densely. theta: for the calibration, the sum of the absolute differences over
    a row's channels that the output of a head may have on average.
    """

    tau: float = 0.004
    local: int = 128
    segment: int = 128
    sinks: int = 32
    block_q: int = 64
    block_k: int = 32
    bits: Literal[4, 8] = 4
    group: int = 1
    dense_below: int = 1024
    theta: float = 0.4

    info = Info(
        slug="sale", phase="prefill", opened={"tau": 0.0},
        tiny={"tau": 1.0, "local": 16, "segment": 16, "sinks": 8, "block_q": 16, "block_k": 8, "dense_below": 0},
        opts_out={
            "chunked": "means and quantisation steps are those of the keys and queries so far, so a chunk's estimates differ",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "the means that are taken off before rounding are over the whole prompt; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, least in (("local", 1), ("segment", 1), ("sinks", 0), ("block_q", 1), ("block_k", 1), ("group", 1), ("dense_below", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"sale({name}={value!r}) is not a whole number of at least {least}")
        for name in ("segment", "sinks"):
            if getattr(self, name) % self.block_k:
                raise ValueError(f"sale({name}={getattr(self, name)}) is not a multiple of block_k={self.block_k}")
        if self.bits not in (4, 8):
            raise ValueError(f"sale(bits={self.bits!r}) is not 4 or 8")
        for name in ("tau", "theta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"sale({name}={value!r}) is not a number from 0 on")

    # -- online ------------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        scores = self._estimate(ctx, q, k, self._near(ctx, q, k, v))
        # what is read anyway has no estimate
        return self._choose(scores, self._taus(ctx, q), q, k, forced=scores == -torch.inf)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # a plan lies on the CPU, where looking at it keeps no device waiting
        opened = not self.tau if ctx.plan is None else not bool(ctx.found("tau").any())
        if q.shape[2] == 1 or k.shape[2] <= self.dense_below or opened:
            return ctx.attend(q, k, v, None)
        near = self._near(ctx, q, k, v)
        return self._rest(ctx, q, k, v, near, self._estimate(ctx, q, k, near), self._taus(ctx, q)).out

    def _taus(self, ctx: LayerContext, q: Tensor) -> Tensor:
        """Threshold of each query head, float64 `(Hq,)`."""
        if ctx.plan is None:
            return torch.full((q.shape[1],), float(self.tau), dtype=torch.float64, device=q.device)
        taus = placed(ctx.found("tau"), q.device, torch.float64)
        if taus.shape != (q.shape[1],):
            raise ValueError(f"this sale plan is for {taus.shape[0]} heads, layer {ctx.layer} has {q.shape[1]}: calibrate this model")
        return taus

    def _reach(self, n_q: int, n_k: int, device: torch.device) -> Tensor:
        """Where the local keys of each query tile begin, int64 `(Tq,)`: a multiple of the segment."""
        first, _ = row_tiles(n_q, self.block_q, n_k - n_q, device)
        return (first - self.local).clamp(min=0) // self.segment * self.segment

    def _near(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """Attention over the sink tile and the local keys, which are the same for all layers of a forward pass."""
        sizes = (self.local, self.segment, self.sinks, self.block_q, self.block_k)
        name = f"sale near keys {sizes} {q.shape[2]} {k.shape[2]} {q.device}"
        if name not in ctx.shared:
            ctx.shared[name] = self._near_keys(q.shape[2], k.shape[2], q.device)
        return ctx.partial(q, k, v, ctx.shared[name])

    def _near_keys(self, n_q: int, n_k: int, device: torch.device) -> Selection:
        cpu = torch.device("cpu")  # lists of a few tiles, which are checked: no device has to wait for that
        reach = self._reach(n_q, n_k, cpu)
        _, last = row_tiles(n_q, self.block_q, n_k - n_q, cpu)
        sinks = run_tiles(torch.zeros_like(reach), reach.clamp(max=self.sinks), self.block_k, n_k)
        starts = torch.cat([sinks, run_tiles(reach, last, self.block_k, n_k)], dim=-1)[None, None]
        near = Selection.from_parts(n_q=n_q, n_k=n_k, block_q=self.block_q, block_k=self.block_k, starts=starts)
        lists = near.starts, near.start_counts, near.tokens, near.token_counts
        there = (x.to(device, non_blocking=True) for x in lists)
        return replace(near, **dict(zip(("starts", "start_counts", "tokens", "token_counts"), there, strict=True)))

    def _estimate(self, ctx: LayerContext, q: Tensor, k: Tensor, near: Partial) -> Tensor:
        """Log of the largest estimated weight of each tile beside the near keys, `(B, Hq, Tq, Tk)`, -inf for near tiles."""
        assert near.lse is not None
        scores = tile_maxima(
            q, k, self.block_q, self.block_k, bits=self.bits, group=self.group, relative_to=near.lse,
            reach=self._reach(q.shape[2], k.shape[2], q.device), scale=ctx.scale, softcap=ctx.softcap,
        )  # fmt: skip
        scores[..., : self.sinks // self.block_k] = -torch.inf
        return scores

    def _choose(self, scores: Tensor, taus: Tensor, q: Tensor, k: Tensor, forced: Tensor | None = None) -> Selection:
        grid = TileGrid.of(q, k, self.block_q, self.block_k)
        # log 0 is -inf: everything that has an estimate
        return choose_threshold(scores, taus.log().to(scores.dtype).unsqueeze(-1), grid, forced=forced)

    def _rest(
        self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, near: Partial, scores: Tensor, taus: Tensor
    ) -> Partial:
        """The attention over near keys, continued over the chosen tiles."""
        return merge(near, ctx.partial(q, k, v, self._choose(scores, taus, q, k)))

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """"errors" `(Hq, C)`: sum of |output - dense output| for each candidate threshold; "tokens" `(1,)`; float64, batch included."""
        near = self._near(ctx, q, k, v)
        scores = self._estimate(ctx, q, k, near)
        dense = ctx.attend(q, k, v, None)
        errors = []
        for tau in CANDIDATES:
            taus = torch.full((q.shape[1],), tau, dtype=torch.float64, device=q.device)
            errors.append((self._rest(ctx, q, k, v, near, scores, taus).out - dense).abs().sum((0, 2, 3), dtype=torch.float64))
        tokens = torch.tensor([float(q.shape[0] * q.shape[2])], dtype=torch.float64, device=q.device)
        return {"errors": torch.stack(errors, dim=-1), "tokens": tokens}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """"tau" `(Hq,)` float64: the first of 0.008, 0.004, ... whose error stays below theta a token; 0 where none does."""
        errors = sums["errors"]
        return {"tau": first_within(torch.zeros(errors.shape[0]), CANDIDATES, errors, self.theta * sums["tokens"])}
