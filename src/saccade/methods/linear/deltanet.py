"""DeltaNet: linear attention whose state is corrected rather than added to, trained in chunks through products of Householder matrices.

    q, k, v = silu(conv(W x)),   q and k of length 1 per head,   beta_t = sigmoid(w_b x_t)
    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    y_t = W_o norm(S_t^T q_t D^-1/2)

Reading a key gives the value last written under it, where linear attention gives the sum of all. The chunked form (the UT transform)
stands in `saccade.ops.scan`.

Source: deltanet, arXiv 2406.06484.
"""

from __future__ import annotations

from dataclasses import dataclass

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear import Recurrent
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.strength import WriteStrength


@register
@dataclass(frozen=True, kw_only=True)
class DeltaNet(Mixer):
    """conv: width of the short convolution in tokens, 0 for none. negative: write strengths up to 2 in place of 1, so that a state may
    change sign along a key."""

    conv: int = 4
    negative: bool = False

    info = Info(slug="deltanet", phase="mixer", needs=frozenset({"training"}), variants=({"negative": True, "conv": 1}, {"conv": 0}))

    def __post_init__(self) -> None:
        if self.conv < 0:
            raise ValueError(f"conv={self.conv}: give a width in tokens, 0 for no convolution")

    def build(self, shape: MixerShape) -> TokenMixer:
        return Recurrent(
            shape, conv=self.conv, q_map="unit", k_map="unit", normaliser=OutputNorm(shape.heads, shape.head_dim), scale=None,
            strength=WriteStrength(shape.dim, shape.heads, 2.0 if self.negative else 1.0),
        )  # fmt: skip
