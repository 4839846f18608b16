"""PowerAttention: blocks at power-of-two distances, so that d layers reach 2^d blocks back without gaps.

With blocks of b tokens and D = floor(i / b) - floor(j / b), query i reads key j <= i iff

    D < w   or   D & (D - 1) == 0   or   j < b

(window, powers of two, sink block): about w + log2(n / b) - 2 blocks a row. Seen as a graph whose layers are steps, any block is
reached from any later one in at most log2(n / b) steps. Relative powers come into view again, so the cache can't shrink: decoding
reads everything here. Without continued training (as the paper does, about 1B tokens) quality is that of a window with far views.

Source: powerattention, arXiv 2503.03588, sections 3 and 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.parts.static import Pattern, compile_pattern, pow2, sink, window
from saccade.parts.static.decoder import check_sizes

TILE = 128  # longest tile; a block is cut into equal tiles


@register
@dataclass(frozen=True, kw_only=True)
class PowerAttention(Prefill):
    """block: tokens a block (b). window: local blocks (w), the query's own included. sinks: first blocks that every query reads.
    dense_of_7: of every seven layers the first so many attend densely (the paper's hybrid for RULER has 2; which two is inferred).
    """

    block: int = 256
    window: int = 5
    sinks: int = 1
    dense_of_7: int = 0

    info = Info(
        slug="powerattention", phase="prefill", opened={"window": 1 << 30}, tiny={"block": 8, "window": 2, "sinks": 1},
        opts_out={
            "chunked": "the last few tokens of a prompt in chunks count as decoding, which is dense; longer chunks give the same",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("powerattention", block=self.block, window=self.window)
        for name, most in (("sinks", math.inf), ("dense_of_7", 7)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
                raise ValueError(f"powerattention({name}={value!r}) is not a whole number of at least 0" + (", at most 7" * (most == 7)))

    @property
    def pattern(self) -> Pattern:
        """The keys that a query may read."""
        return window(self.window, block=self.block) | pow2(block=self.block) | sink(self.sinks, block=self.block)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        # tiles that lie inside blocks on both sides make the lists exact, also where a chunk begins inside a block
        block_k = max(t for t in range(1, min(TILE, self.block) + 1) if self.block % t == 0)
        block_q = math.gcd(block_k, n_k - n_q)
        return compile_pattern(self.pattern, n_q, n_k, block_q=block_q, block_k=block_k, device=q.device).selection

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dense = ctx.layer % 7 < self.dense_of_7
        if dense or q.shape[2] == 1 or self.window * self.block >= k.shape[2]:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))
