"""Lightning attention (TransNormerLLM's mixer): linear attention with a constant decay per head, no denominator and a gated norm.

    q, k = silu(W x),   v = W_v x,   u = W_u x
    S_t = e^(-s_h) S_{t-1} + k_t v_t^T,    y_t = W_o (norm(S_t^T q_t over all heads) * u_t)

Inside a block of tokens it is computed as a masked quadratic form, across blocks through the state, so that the time per token does not
grow with the length (`saccade.ops.scan`). The norm has no weights. Two formulas for the slopes s_h circulate: see `lightning_slopes`.

Source: lightning-attention, arXiv 2405.17381; slopes and norm: transnormerllm, arXiv 2307.14995.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear import Recurrent
from saccade.parts.linear.gates import HeadGate
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.slopes import lightning_slopes


@register
@dataclass(frozen=True, kw_only=True)
class LightningAttention(Mixer):
    """slopes: "alibi" (the released models), "linear" (the paper) or "none" (no decay). rotary: turn q and k by their positions after
    the activation; the released models do so in the first layer only."""

    slopes: Literal["alibi", "linear", "none"] = "alibi"
    rotary: bool = False

    info = Info(
        slug="lightning-attention", phase="mixer", needs=frozenset({"training"}),
        variants=({"slopes": "none", "rotary": True}, {"slopes": "linear"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        lightning_slopes(1, 0, 1, self.slopes)

    def build(self, shape: MixerShape) -> TokenMixer:
        return Recurrent(
            shape, q_map="silu", k_map="silu", gate=HeadGate(lightning_slopes(shape.heads, shape.layer, shape.layers, self.slopes)),
            normaliser=OutputNorm(shape.heads, shape.head_dim, over="all", weight=False), rotary="after" if self.rotary else None,
            out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "none"),
        )  # fmt: skip
