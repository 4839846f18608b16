"""S2-Attention: every head reads a local window and its own share of strided blocks, so that together the heads read everything.

With blocks of b tokens, query block i and key block j, head h of H (the key/value head: the query heads of a group share it):

    read  iff  j <= i  and  ( i - j < local   or   (j + h * step) mod v = 0 ),   step = max(1, floor(v / H))

The stride is absolute in j: a block that leaves the window and is not among the head's strided ones is never read again, so it can go
for good. Some layers stay dense. It is an architecture: models are trained with it from the start, and keep it. `prefill="s2-attention"`
applies it in training and to prompts. Beside it, `cache="s2-attention"` drops what has gone out of view (local * b + n / v tokens stay)
and single steps read the rest; or `decode="s2-attention"` reads what is in view of a whole cache.

Source: s2-attention, arXiv 2407.17678, section 3; field names as in its Phi-3-small setting.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core import Info, LayerContext, register
from saccade.parts.static import Pattern, head_offsets, stride, window
from saccade.parts.static.architecture import StaticArchitecture
from saccade.parts.static.decoder import check_sizes

EVERYTHING = 1 << 40  # blocks: a window that no sequence outgrows


@register
@dataclass(frozen=True, kw_only=True)
class S2Attention(StaticArchitecture):
    """block: tokens a block (b). local: blocks of the window, the query's own included. stride: every how many blocks a head reads one
    beyond the window (v; 1 reads everything). dense_every: of so many layers the last one is dense; 0: none. dense_heads: the last
    key/value heads, which read everything. heterogeneous: whether heads take different blocks; if not, all take the first one's.
    """

    block: int = 64
    local: int = 16
    stride: int = 8
    dense_every: int = 2
    dense_heads: int = 0
    heterogeneous: bool = True

    info = Info(
        slug="s2-attention", phase="prefill", needs=frozenset({"training"}), opened={"local": 1 << 30},
        tiny={"block": 8, "local": 2, "stride": 4},
        opts_out={
            "chunked": "the last few tokens of a prompt in chunks count as decoding, which is dense until decode= or cache= is given too",
            "stepwise": "single tokens are decoded densely until the method is also given as decode= or cache=",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("s2-attention", block=self.block, local=self.local, stride=self.stride)
        for name in ("dense_every", "dense_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"s2-attention({name}={value!r}) is not a whole number of at least 0")

    def pattern(self, ctx: LayerContext) -> Pattern | None:
        dense = self.dense_every > 0 and ctx.layer % self.dense_every == self.dense_every - 1
        if dense or self.stride == 1 or self.local * self.block >= ctx.seen:
            return None
        return self.heads(ctx.layout.kv_heads)

    def heads(self, kv_heads: int) -> Pattern:
        """The pattern of a sparse layer with so many key/value heads."""
        offsets = head_offsets(self.stride, kv_heads) if self.heterogeneous else 0
        blocks = stride(self.stride, offsets, block=self.block)
        if not self.dense_heads:
            return window(self.local, block=self.block) | blocks
        first_dense = kv_heads - self.dense_heads
        return window([self.local if h < first_dense else EVERYTHING for h in range(kv_heads)], block=self.block) | blocks
