"""LongGen: the outer two thirds of the layers read a static pattern, the middle third everything.

Layers 0 ... L/3 and 2L/3 ... L read, in blocks of b tokens with query block i and key block j <= i,

    variant "sink":     j < sinks   or   i - j < window
    variant "blocks":   i - j < window   or   (j + h * step) mod v = 0   or   j < sinks       (s2-attention's, h the key/value head)

Models are turned into this while their context is extended (continued pretraining on long documents, with a larger rotary base), and
keep the same masks afterwards: `prefill="longgen"` applies them in training and to prompts; beside it, `cache="longgen"` lets the sparse
layers hold sinks or strided blocks and a ring of recent ones, which single steps then read (`decode="longgen"`: the same over a whole
cache). With a share rho kept in sparse layers, the cache has 1/3 + 2/3 rho of its size.

Source: longgen, arXiv 2410.01485, section 3. Stride, window and head offsets are inferred: the paper says that blocks have 64 tokens
and that about 2K are kept at 128K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, LayerContext, register
from saccade.parts.static import CachePlan, Pattern, head_offsets, sink, stride, window
from saccade.parts.static.architecture import StaticArchitecture
from saccade.parts.static.decoder import check_sizes


@register
@dataclass(frozen=True, kw_only=True)
class LongGen(StaticArchitecture):
    """variant: see above. block: tokens a block (b). window: blocks of the window, the query's own included. sinks: first blocks that
    every query reads. stride: every how many blocks a head of "blocks" reads one beyond the window (v). dense: which third of the
    layers is dense: the "middle", half of it at either of the "ends", or "none" (the paper's comparisons).
    """

    variant: Literal["sink", "blocks"] = "sink"
    block: int = 64
    window: int = 31
    sinks: int = 1
    stride: int = 128
    dense: Literal["middle", "ends", "none"] = "middle"

    info = Info(
        slug="longgen", phase="prefill", needs=frozenset({"training"}), opened={"window": 1 << 30},
        tiny={"block": 8, "window": 2},
        opts_out={
            "chunked": "the last few tokens of a prompt in chunks count as decoding, which is dense until decode= or cache= is given too",
            "stepwise": "single tokens are decoded densely until the method is also given as decode= or cache=",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("longgen", block=self.block, window=self.window, stride=self.stride)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"longgen(sinks={self.sinks!r}) is not a whole number of at least 0")
        for name, known in (("variant", ("sink", "blocks")), ("dense", ("middle", "ends", "none"))):
            if getattr(self, name) not in known:
                raise ValueError(f"longgen({name}={getattr(self, name)!r}) is not one of {', '.join(known)}")

    def is_dense(self, layer: int, layers: int) -> bool:
        """Whether this one of `layers` layers reads everything."""
        if self.dense == "middle":
            return layers <= 3 * layer < 2 * layers
        # as many layers as in the middle, the first ones and the last ones
        count = sum(layers <= 3 * i < 2 * layers for i in range(layers))
        return self.dense == "ends" and (layer < (count + 1) // 2 or layer >= layers - count // 2)

    def pattern(self, ctx: LayerContext) -> Pattern | None:
        if self.is_dense(ctx.layer, ctx.layers) or self.window * self.block >= ctx.seen:
            return None
        return self.heads(ctx.layout.kv_heads)

    def heads(self, kv_heads: int) -> Pattern:
        """The pattern of a sparse layer with so many key/value heads."""
        near = window(self.window, block=self.block)
        if self.variant == "blocks":
            near = near | stride(self.stride, head_offsets(self.stride, kv_heads), block=self.block)
        return near | sink(self.sinks, block=self.block) if self.sinks else near

    def kv_share(self, n: int, layers: int, kv_heads: int = 1) -> float:
        """Share of the cache of a dense model that is held after n tokens: 1/3 + 2/3 rho with three layers or a multiple."""
        kept = self.kept(n, kv_heads) / n
        dense = sum(self.is_dense(i, layers) for i in range(layers))
        return (dense + (layers - dense) * kept) / layers

    def kept(self, n: int, kv_heads: int = 1) -> float:
        """Tokens that a sparse layer holds after n tokens, the mean over heads."""
        return float(CachePlan(self.heads(kv_heads), kv_heads).size(n - 1).double().mean())
