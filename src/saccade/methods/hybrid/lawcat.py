"""LAWCAT: softmax layers become normalised gated linear attention, with short convolutions over the queries and keys of a trained model.

    q, k = conv(W x), depthwise over the last tokens, the identity at first; v = W x; then the rotary embedding, if any
    phi(x) = [softmax(W x), softmax(-W x)], one map per head, others for q and k
    log G_t = logsigmoid(W_2 W_1 x_t + b) / temperature,  per feature
    S_t = G_t S_{t-1} + phi(k_t) v_t^T,   z_t = G_t z_{t-1} + phi(k_t),   o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Sums and denominator share the gate, so weights are positive and sum to one at every length. It is taught as lolcats is, by
`saccade.train.convert`.

Source: lawcat, arXiv 2509.18467.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.features import Hedgehog
from saccade.parts.linear.gates import SigmoidGate, heads_first
from saccade.parts.linear.normalise import RowSum
from saccade.parts.linear.recurrent import Recurrent


@register
@dataclass(frozen=True, kw_only=True)
class Lawcat(Mixer):
    """conv: width of the convolutions on q and k in tokens, at least 1. features: rows of a map's W, default head_dim; phi has twice as
    many. rank: of the gate's map. temperature: larger forgets slower. rotary, theta, bias: as in the model that is converted."""

    conv: int = 4
    features: int | None = None
    rank: int = 16
    temperature: float = 16.0
    rotary: bool = True
    theta: float = 10000.0
    bias: bool = False

    info = Info(
        slug="lawcat", phase="mixer", needs=frozenset({"training"}), variants=({"conv": 1, "rotary": False}, {"features": 3, "rank": 2}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.conv < 1 or self.rank < 1 or (self.features is not None and self.features < 1):
            raise ValueError(f"conv={self.conv}, rank={self.rank}, features={self.features}: give at least 1 for each")
        if self.temperature <= 0 or self.theta <= 0:
            raise ValueError(f"temperature={self.temperature}, theta={self.theta}: give positive numbers")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LawcatMixer(shape, self)


class LawcatMixer(Recurrent):
    """The layer, with a Llama's projections."""

    def __init__(self, shape: MixerShape, method: Lawcat) -> None:
        width = 2 * (method.features or shape.head_dim)
        super().__init__(
            shape, q_map=Hedgehog(shape.heads, shape.head_dim, method.features),
            k_map=Hedgehog(shape.kv_heads, shape.head_dim, method.features),
            gate=SigmoidGate(shape.dim, shape.kv_heads, width, method.rank, method.temperature), normaliser=RowSum(),
            rotary="before" if method.rotary else None, theta=method.theta,
        )  # fmt: skip
        if method.bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                own = getattr(self, name)
                setattr(self, name, torch.nn.Linear(own.in_features, own.out_features))
        self.qk_conv = ShortConv(self.widths[0] + self.widths[1], method.conv, None)
        with torch.no_grad():
            self.qk_conv.weight.zero_()[:, -1] = 1.0

    def project(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        (q, k), tail = self.qk_conv.each((self.q_proj(x), self.k_proj(x)), past.get("conv"), call.lengths)
        return heads_first(q, self.heads), heads_first(k, self.kv_heads), heads_first(self.v_proj(x), self.kv_heads), {"conv": tail}
