"""Random tiles: each block of queries reads as many blocks of keys, drawn at random, as a given density allows.

The floor of sparse prefill: a method that chooses must do better than this at equal density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.core.tilemath import causal_pairs, row_tiles

HALVINGS = 24  # of the bisection for the share of the tiles


@register
@dataclass(frozen=True, kw_only=True)
class RandomTiles(Prefill):
    """Tiles are drawn for each query head anew. Decoding is dense.

    density: share of the visible pairs that is computed, in (0, 1]. What is always read may be more than that, and then it is all that is
    read. block: queries and keys per tile, tokens. sinks: first keys that are always read, rounded up to whole tiles; a block of queries
    always reads its own keys too.
    """

    density: float = 0.2
    block: int = 64
    sinks: int = 1

    info = Info(
        slug="random-tiles", phase="prefill", opened={"density": 1.0}, tiny={"density": 0.3, "block": 8},
        opts_out={
            "chunked": "every chunk of a prompt draws its own tiles",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.density, bool) or not isinstance(self.density, int | float) or not 0 < self.density <= 1:
            raise ValueError(f"random-tiles(density={self.density!r}) is not a share above 0 and at most 1")
        for name, least in (("block", 1), ("sinks", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"random-tiles({name}={value!r}) is not a whole number of at least {least}")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k, block = q.shape[2], k.shape[2], self.block
        begin, end = row_tiles(n_q, block, n_k - n_q, torch.device("cpu"))
        tiles = torch.arange(math.ceil(n_k / block))
        visible = tiles * block < end[:, None]
        forced = visible & ((tiles * block < self.sinks) | ((tiles + 1) * block > begin[:, None]))
        counts = self._counts(begin, end, visible, forced)
        # the same draws for every row of a batch: a row reads what it would read alone
        draws = torch.rand(1, q.shape[1], *visible.shape, generator=ctx.generator())
        draws = draws.masked_fill(forced, 2.0).masked_fill(~visible, -1.0).to(q.device)
        ranks = draws.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        chosen = ranks < counts.to(q.device)[:, None]
        return Selection.from_block_mask(chosen, block_q=block, block_k=block, n_q=n_q, n_k=n_k)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.density == 1 or q.shape[2] == 1:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    def _counts(self, begin: Tensor, end: Tensor, visible: Tensor, forced: Tensor) -> Tensor:
        """Tiles that each block of queries reads, int64 `(Tq,)`: the same share of the visible ones, as large as the density allows."""
        block, keys = self.block, torch.arange(visible.shape[1]) * self.block
        pairs = causal_pairs(begin[:, None], end[:, None], keys, keys + block)
        first = (pairs * forced).sum(-1)
        # the tiles that are not forced lie wholly in the past: all of a row cost the same
        each, all_of, least = (end - begin) * block, visible.sum(-1), forced.sum(-1)
        wanted, low, high = self.density * float(pairs.sum()), 0.0, 1.0

        def counts(share: float) -> Tensor:
            return torch.maximum(least, (share * all_of).round().long()).minimum(all_of)

        for _ in range(HALVINGS):
            middle = (low + high) / 2
            cost = float((first + (counts(middle) - least) * each).sum())
            low, high = (middle, high) if cost <= wanted else (low, middle)
        return counts(1.0 if self.density == 1 else low)
