"""TransNormer: linear attention without a denominator, its output normalised, behind early layers of attention inside blocks.

    part="norm":  o_t = norm(sum_{j<=t} (phi(q_t) . phi(k_j)) v_j),   phi = 1 + elu, an RMS norm over all heads together
    part="diag":  o_t = softmax(q_t K^T D^-1/2) V over the tokens of t's block alone  (blocks="softmax", T1), or norm(relu(..) V) (T2)

The denominator of linear attention makes gradients unbounded (|dp / ds| up to 1 / (4 |s|)); the norm bounds them. The blocks, of 64
tokens, don't overlap: they keep attention from spreading evenly over all tokens. By default the first half of the layers is "diag" and the
second "norm". With `bidirectional=True` tokens read whole blocks, and the whole sequence.

Source: transnormer, arXiv 2210.10340.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.blocks import Weights, attend_blocks, block_oracle
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.normalise import OutputNorm


@register
@dataclass(frozen=True, kw_only=True)
class TransNormer(TwoWayMixer):
    """part: "auto" (by depth), "norm" or "diag". block: tokens of a block. blocks: "softmax" (T1) or "relu" (T2)."""

    part: Literal["auto", "norm", "diag"] = "auto"
    block: int = 64
    blocks: Weights = "softmax"

    info = Info(
        slug="transnormer", phase="mixer", needs=frozenset({"training"}), tiny={"block": 16},
        variants=(
            {"part": "norm"}, {"part": "diag", "block": 13, "blocks": "relu"}, {"part": "norm", "bidirectional": True},
            {"block": 100, "bidirectional": True}, {"block": 100, "blocks": "relu", "bidirectional": True},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part not in ("auto", "norm", "diag") or self.blocks not in ("softmax", "relu"):
            raise ValueError(f"part={self.part!r}, blocks={self.blocks!r}: use 'auto', 'norm' or 'diag', and 'softmax' or 'relu'")
        if self.block < 1:
            raise ValueError(f"block={self.block}: give at least 1 token")

    def build(self, shape: MixerShape) -> TokenMixer:
        norm = OutputNorm(shape.heads, shape.head_dim, over="all")
        if self.part == "norm" or (self.part == "auto" and 2 * shape.layer >= shape.layers):
            return BothWays(shape, q_map="elu+1", k_map="elu+1", normaliser=norm, bidirectional=self.bidirectional)
        return DiagAttention(shape, self, norm if self.blocks == "relu" else None)


class DiagAttention(BothWays):
    """Attention inside blocks, with the projections of the other layers."""

    def __init__(self, shape: MixerShape, method: TransNormer, norm: OutputNorm | None) -> None:
        super().__init__(shape, bidirectional=method.bidirectional, normaliser=norm)
        self._blocks: dict[str, Any] = {"block": method.block, "weights": method.blocks, "bidirectional": method.bidirectional}

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, k, v, _ = self.project(x, past, call)
        out, kept = attend_blocks(q, k, v, past, call, **self._blocks)
        return self.finish(self.normaliser.after(out, call, None), x), kept

    def naive(self, x: Tensor) -> Tensor:
        call = self.whole(x)
        q, k, v, _ = self.project(x, {}, call)
        out = block_oracle(q, k, v, **self._blocks)
        return self.finish(self.normaliser.after(out, call, None), x)
