"""Efficient attention: queries normalised over channels, keys over positions, and keys multiplied with values first.

    softmax:  Qh = softmax over the channels of a head,  Kh = softmax over tokens,   O = Qh (Kh^T V)
    scaling:  Qh = Q / sqrt(N),  Kh = K / sqrt(N),   so O = (Q K^T) V / N

Each channel of a key is a map over the whole sequence, its product with the values a global context vector. The paper reads all tokens
(`bidirectional=True`); causal, the softmax over tokens is cumulative, a scan with a gate per channel, and the scaling is by the tokens so
far. The residual around a layer is the paper's "+ x".

Source: efficient-attention, arXiv 1812.01243.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.counts import CountPower
from saccade.parts.linear.two_softmaxes import two_softmaxes


@register
@dataclass(frozen=True, kw_only=True)
class EfficientAttention(TwoWayMixer):
    """norm: "softmax" or "scaling". key_dim, value_dim: channels of a head in q and k and in v (default: head_dim)."""

    norm: Literal["softmax", "scaling"] = "softmax"
    key_dim: int | None = None
    value_dim: int | None = None

    info = Info(
        slug="efficient-attention", phase="mixer", needs=frozenset({"training"}),
        variants=({"norm": "scaling", "key_dim": 6}, {"bidirectional": True}, {"bidirectional": True, "norm": "scaling", "value_dim": 5}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("softmax", "scaling"):
            raise ValueError(f"norm={self.norm!r} is not 'softmax' or 'scaling'")
        if any(width is not None and width < 1 for width in (self.key_dim, self.value_dim)):
            raise ValueError(f"key_dim={self.key_dim}, value_dim={self.value_dim}: give at least 1 channel, or None for head_dim")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.norm == "softmax":
            return two_softmaxes(shape, bidirectional=self.bidirectional, key_dim=self.key_dim, value_dim=self.value_dim)
        return BothWays(
            shape, key_dim=self.key_dim, value_dim=self.value_dim, bidirectional=self.bidirectional,
            normaliser=CountPower(-1.0, bidirectional=self.bidirectional),
        )  # fmt: skip
