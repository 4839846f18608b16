"""PBS-Attn: keys are sorted by importance inside segments, so that the heavy ones share few blocks; then blocks are chosen as usual.

    s_j    = mean over the last `block` queries of softmax(q k^T * scale)_j           over all whole segments
    pi     = argsort(-s) inside each segment of `segment` keys                         queries keep their order
    P      = softmax(scale * mean(q block) . mean(pi(k) block))                        over the blocks of earlier segments
    a query block reads the fewest blocks with P >= tau, the block that now holds the first key, and all of its own segment

No key leaves its segment, so blocks of earlier segments are wholly visible; in the own segment a row sees the keys whose position is not
after its own. Decoding is dense.

Source: pbs-attn, arXiv 2510.21270, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.core.tilemath import row_tiles
from saccade.ops.estimate import TileGrid, choose_top_p, pool_blocks, row_sums
from saccade.ops.estimate.reference import products
from saccade.parts.antidiagonal import antidiagonal_mass
from saccade.parts.permute import Permuted, permute, segment_order


@register
@dataclass(frozen=True, kw_only=True)
class PBSAttention(Prefill):
    """Blocks are chosen for each query head.

    tau: share of the pooled attention to earlier segments that the chosen blocks hold, in (0, 1]; the block that crosses it is read; 1 is
    dense. block: queries and keys per tile, tokens, and how many last queries say what is important. segment: keys that are sorted
    together, a multiple of block; prompts of up to this many tokens are read densely. order: "head" sorts for each query head, and copies
    the keys for each; "group" sorts once for the query heads that share keys. scores: "mean" pools blocks; "antidiagonal" is the paper's
    variant "+", which finds single matching tokens that a mean hides: softmax over means along antidiagonals of `stride` tokens.
    """

    tau: float = 0.9
    block: int = 128
    segment: int = 256
    order: Literal["head", "group"] = "head"
    scores: Literal["mean", "antidiagonal"] = "mean"
    stride: int = 8

    info = Info(
        slug="pbs-attn", phase="prefill", opened={"tau": 1.0}, tiny={"tau": 0.4, "block": 8, "segment": 16},
        opts_out={
            "chunked": "the order of the keys is made by the last queries of what is given, so every chunk sorts and chooses anew",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "keys are sorted by the attention of the last queries of the prompt; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 < self.tau <= 1:
            raise ValueError(f"pbs-attn(tau={self.tau!r}) is not a share above 0 and at most 1")
        for name in ("block", "segment", "stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"pbs-attn({name}={value!r}) is not a whole number of at least 1")
        if self.segment % self.block:
            raise ValueError(f"pbs-attn(segment={self.segment}) is not a multiple of block={self.block}")
        if self.order not in ("head", "group"):
            raise ValueError(f"pbs-attn(order={self.order!r}) is not one of head, group")
        if self.scores not in ("mean", "antidiagonal"):
            raise ValueError(f"pbs-attn(scores={self.scores!r}) is not one of mean, antidiagonal")
        if self.scores == "antidiagonal" and self.block % self.stride:
            raise ValueError(f"pbs-attn(stride={self.stride}) does not divide block={self.block}")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """The keys that are read, by their own positions: single tokens outside whole tiles."""
        n_q, n_k = q.shape[2], k.shape[2]
        if self._opened(q, k):
            return Selection.full(n_q, n_k, block_q=self.block, block_k=self.block, device=q.device)
        moved = self._permute(ctx, q, k, v)
        listed = replace(self._choose(ctx, q, moved), causal=False).expand(q.shape[0], q.shape[1]).coverage()
        places = moved.positions.repeat_interleave(q.shape[1] // moved.positions.shape[1], dim=1).unsqueeze(2)
        mask = torch.zeros_like(listed).scatter_(-1, places.expand(listed.shape), listed)
        return Selection.from_token_mask(mask, block_q=self.block, n_q=n_q, block_k=self.block)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self._opened(q, k):
            return ctx.attend(q, k, v, None)
        moved = self._permute(ctx, q, k, v)
        rows = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[None, None]
        return ctx.attend(q, moved.k, moved.v, self._choose(ctx, q, moved), q_positions=rows, k_positions=moved.positions)

    def _opened(self, q: Tensor, k: Tensor) -> bool:
        return self.tau == 1 or k.shape[2] <= self.segment

    def _permute(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Permuted:
        """Keys and values sorted in their segments for each query head, or each key/value head with order="group"."""
        whole = k.shape[2] // self.segment * self.segment
        importance = row_sums(
            q[:, :, -self.block :], k[:, :, :whole], causal=False, scale=ctx.scale, softcap=ctx.softcap
        ).columns
        if self.order == "group":
            importance = importance.unflatten(1, (k.shape[1], -1)).sum(2)
        return permute(k, v, segment_order(importance, self.segment))

    def _choose(self, ctx: LayerContext, q: Tensor, moved: Permuted) -> Selection:
        """A Selection over the layout: causal by the positions of its keys, which travel with it."""
        grid = TileGrid.of(q, moved.k, self.block, self.block, causal=False)
        earlier, own = self._segments(grid, q.device)
        if self.scores == "antidiagonal":
            weights = antidiagonal_mass(q, moved.k, self.block, self.stride, earlier, scale=ctx.scale)
        else:
            scores = products(pool_blocks(q, self.block) * ctx.scale, pool_blocks(moved.k, self.block))
            weights = scores.masked_fill_(~earlier, -torch.inf).softmax(-1)
        # a row of the first segment has no candidates; what is no candidate must not be chosen for its weight of 0
        weights = weights.masked_fill_(~earlier, -torch.inf)
        first = (moved.positions == 0).int().argmax(-1).repeat_interleave(q.shape[1] // moved.positions.shape[1], dim=1) // self.block
        sink = (torch.arange(grid.columns, device=q.device) == first.unsqueeze(-1)).unsqueeze(2)
        chosen = choose_top_p(weights, float(self.tau), grid, forced=own | sink & earlier, inside=False)
        return replace(chosen, causal=True)

    def _segments(self, grid: TileGrid, device: torch.device) -> tuple[Tensor, Tensor]:
        """bool `(Tq, Tk)` each: key blocks of segments before that of the tile's first row; key blocks of its rows' own segments."""
        begin, end = row_tiles(grid.n_q, self.block, grid.offset, device)
        of_keys = torch.arange(grid.columns, device=device) * self.block // self.segment
        first, last = begin.unsqueeze(-1) // self.segment, (end - 1).unsqueeze(-1) // self.segment
        return of_keys < first, (of_keys >= first) & (of_keys <= last)
