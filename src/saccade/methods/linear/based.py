"""Based: second-order Taylor linear attention with tiny keys, exact attention in small windows, and short gated convolutions.

    part="linear":  o_t = sum_{j<=t} w_tj v_j / sum_{j<=t} w_tj,   w_tj = 1 + s + s^2 / 2,   s = q_t . k_j / sqrt(d'),   d' = 16
    part="window":  softmax attention with rotary embedding over the last w = 64 tokens
    part="conv":    y_t = conv(x)_t * (W x_t), depthwise over the last 3 tokens (BaseConv; the residual around a layer is its "+ x")

Each layer is one of the three; the state's size is dialled by d' and w. The paper mixes about one layer in five of the first, one in
five of the second, and convolutions: `["based(part='conv')"] * 3 + ["based", "based(part='window')"]`. The linear part has no
positions, and each product of two channels of a key is kept once: 1 + 16 + 136 = 153 features.

Source: based, arXiv 2402.18668.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.softmax import Softmax
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.polynomial import PolynomialAttention


@register
@dataclass(frozen=True, kw_only=True)
class Based(Mixer):
    """part: "linear", "window" or "conv". features: channels d' of a head in q and k of the linear part. window: tokens a query of the
    window part sees, its own among them. conv: width of the convolution part in tokens."""

    part: Literal["linear", "window", "conv"] = "linear"
    features: int = 16
    window: int = 64
    conv: int = 3

    info = Info(
        slug="based", phase="mixer", needs=frozenset({"training"}), tiny={"features": 4},
        variants=({"part": "window", "window": 16}, {"part": "conv"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.part not in ("linear", "window", "conv"):
            raise ValueError(f"part={self.part!r} is not 'linear', 'window' or 'conv'")
        if min(self.features, self.window, self.conv) < 1:
            raise ValueError(f"features={self.features}, window={self.window}, conv={self.conv}: give at least 1 each")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.part == "window":
            return Softmax(window=self.window).build(shape)
        if self.part == "conv":
            return BaseConv(shape, self.conv)
        return PolynomialAttention(shape, key_dim=self.features, scale=None, form="auto")


class BaseConv(TokenMixer):
    """`y = conv(x) * (W x)`."""

    batches_padding = True

    def __init__(self, shape: MixerShape, width: int) -> None:
        super().__init__(shape)
        self.conv = ShortConv(shape.dim, width, None, bias=True)
        self.project = nn.Linear(shape.dim, shape.dim)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        y, tail = self.conv(x, past.get("conv"), call.lengths)
        return y * self.project(x), {"conv": tail}

    def naive(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x) if self.conv.bias is None else self.conv.bias.expand_as(x)
        for back, weight in enumerate(self.conv.weight.unbind(1)[::-1]):
            y = y + nn.functional.pad(x, (0, 0, back, 0))[:, : x.shape[1]] * weight
        return y * self.project(x)
