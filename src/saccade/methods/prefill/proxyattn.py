"""ProxyAttn: heads agree on which tokens matter and differ in how many they need; a few averaged heads score blocks for all.

    Q_g, K_g      mean queries and mean keys of the heads of group g
    P_g           softmax(scale * Q_g K_g^T), causal, over every `stride`-th query and key
    A_g[m, n]     the largest P_g of block pair (m, n)
    b_i           the fewest key blocks that hold the share gamma of head i's own attention in the last block of queries, over all blocks
    head i, block m of queries: the ceil(b_i N_m) best of its N_m visible blocks by A_g[m, :], at least `least` tokens of them;
                  the diagonal and the first block are read besides

Decoding is dense.

Source: proxyattn, arXiv 2509.24745, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Budget, Info, LayerContext, Mass, Prefill, Selection, register
from saccade.ops.estimate import TileGrid, choose_top_k, pooled_probabilities, row_sums
from saccade.parts.proxy_heads import mean_heads


@register
@dataclass(frozen=True, kw_only=True)
class ProxyAttn(Prefill):
    """Blocks are scored for each group of heads and counted for each query head.

    gamma: share of its last block's attention that a head's budget holds, in (0, 1]. groups: averaged heads, which divide the query heads
    evenly and keep or join whole groups of key/value heads (1 for Llama-3.1-8B, 4 for Qwen2.5-7B in the paper). stride: one in so many
    queries and keys takes part in the scores; it divides block. least: blocks of at least so many tokens are read. block: queries and
    keys a block.
    """

    gamma: float = 0.95
    groups: int = 1
    stride: int = 4
    least: int = 2048
    block: int = 128

    info = Info(
        slug="proxyattn", phase="prefill", opened={"gamma": 1.0},
        tiny={"gamma": 0.4, "stride": 2, "least": 4, "block": 4},
        opts_out={
            "chunked": "budgets come from the last block of what is given, so every chunk of a prompt has its own",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "rows of a block choose together, and the prompt's last rows set every budget; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, int | float) or not 0 < self.gamma <= 1:
            raise ValueError(f"proxyattn(gamma={self.gamma!r}) is not a share above 0 and at most 1")
        for name, least in (("groups", 1), ("stride", 1), ("least", 0), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"proxyattn({name}={value!r}) is not a whole number of at least {least}")
        if self.block % self.stride:
            raise ValueError(f"proxyattn(stride={self.stride}) does not divide blocks of {self.block}: choose one that does")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        grid = TileGrid.of(q, k, self.block, self.block)
        scores = pooled_probabilities(
            *mean_heads("proxyattn", q, k, self.groups), self.block, self.block, reduce="max", stride=self.stride, scale=ctx.scale,
            softcap=ctx.softcap,
        )  # fmt: skip
        scores = scores.repeat_interleave(q.shape[1] // self.groups, dim=1)
        counts = self._counts(self._budgets(ctx, q, k), grid)
        return choose_top_k(scores, counts, grid, sinks=1, local=1, inside=False)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self.gamma == 1 or k.shape[2] <= self.least:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    def _budgets(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        """Key blocks that hold the share gamma of each head's last block of queries, `(B, Hq)` int64."""
        mass = row_sums(q[:, :, -self.block :], k, scale=ctx.scale, softcap=ctx.softcap).columns
        by_block = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % self.block)).unflatten(-1, (-1, self.block)).sum(-1)
        return Budget(Mass(self.gamma)).counts(by_block)

    def _counts(self, budgets: Tensor, grid: TileGrid) -> Tensor:
        """`ceil(b_i N_m)`, or `least` tokens, of the visible blocks of each query block: int32 `(B, Hq, Tq)`."""
        visible = grid.visible(budgets.device).sum(-1)
        # whole numbers: ceil(budget / columns * visible) without rounding
        wanted = -torch.div(-budgets.unsqueeze(-1) * visible, grid.columns, rounding_mode="floor")
        return torch.minimum(wanted.clamp(min=math.ceil(self.least / self.block)), visible).to(torch.int32)
