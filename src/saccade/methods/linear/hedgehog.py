"""Hedgehog: linear attention whose feature maps are learned, one layer per head, to imitate softmax's weights.

    phi(x) = [f(W x + b), f(-(W x + b))],   W = 1, b = 0 at first, other maps for q and k
    a_tj = phi(q_t) . phi(k_j) / sum_{m<=t} phi(q_t) . phi(k_m)
    mimicry: minimise -sum_j p_tj log a_tj over W and b, p = softmax(q_t . k_j D^-1/2), q and k as they are after the rotary embedding

f is a softmax over each half (stable, the form in use), one softmax over both, or exp. A trained model is converted by learning the maps
layer by layer (`HedgehogMixer.mimicry`), then tuning everything (or low-rank factors). Keys shared by a group of query heads have one map.

Source: hedgehog, arXiv 2402.04347.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.features import Hedgehog as HedgehogMap
from saccade.parts.linear.mimicry import linear_weights, mimicry_loss, softmax_weights
from saccade.parts.linear.normalise import RowSum

Activation = Literal["softmax", "joint", "exp"]


@register
@dataclass(frozen=True, kw_only=True)
class Hedgehog(TwoWayMixer):
    """activation: "softmax" (over each half), "joint" (one over both, of twice the logits) or "exp". bias: whether the maps have b.
    rotary: turn q and k by their positions before the maps."""

    activation: Activation = "softmax"
    bias: bool = True
    rotary: bool = True

    info = Info(
        slug="hedgehog", phase="mixer", needs=frozenset({"training"}),
        variants=({"activation": "joint", "rotary": False}, {"activation": "exp", "bias": False, "bidirectional": True}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ("softmax", "joint", "exp"):
            raise ValueError(f"activation={self.activation!r} is not 'softmax', 'joint' or 'exp'")

    def build(self, shape: MixerShape) -> TokenMixer:
        def learned(heads: int) -> HedgehogMap:
            if self.activation == "joint":
                return JointMap(heads, shape.head_dim, bias=self.bias)
            return HedgehogMap(heads, shape.head_dim, activation=self.activation, bias=self.bias)

        return HedgehogMixer(
            shape, q_map=learned(shape.heads), k_map=learned(shape.kv_heads), rotary="before" if self.rotary else None,
            normaliser=RowSum(), bidirectional=self.bidirectional,
        )  # fmt: skip


class JointMap(HedgehogMap):
    """One softmax over both halves: `softmax([2 y, -2 y])` with `y = W x + b`."""

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT
        y = 2 * (y if self.bias is None else y + self.bias)
        return torch.cat([y, -y], dim=-1).softmax(-1).clamp(min=self.floor)


class HedgehogMixer(BothWays):
    """The layer, and what its maps are taught by."""

    def mimicry(self, x: Tensor) -> Tensor:
        """The loss of the maps against softmax on tokens x `(B, N, dim)` without padding; nothing but W and b gets a gradient."""
        call = self.whole(x)
        with torch.no_grad():
            q, k, _, _ = self.project(x, {}, call)
            if self.rotary is not None:
                q, k = self.rotary(q, call.positions), self.rotary(k, call.positions)
            teacher = softmax_weights(q, k, causal=not self.bidirectional)
        return mimicry_loss(teacher, linear_weights(self.q_map(q), self.k_map(k), causal=not self.bidirectional))
