"""Kimi delta attention (KDA): the delta rule with a forget gate for every channel of the keys.

    q, k, v = silu(conv(W x)),   q and k of length 1 per head,   beta_t = sigmoid(w_b x_t)
    log g_t = -exp(A) softplus(W_2 W_1 x_t + b)        per channel; A per head; W_1, W_2 of rank D
    S_t = (I - beta_t k_t k_t^T) diag(g_t) S_{t-1} + beta_t k_t v_t^T
    y_t = W_o (sigmoid(W_4 W_3 x_t) * norm(S_t^T q_t D^-1/2))

The gate acts before the error is taken. The paper interleaves three such layers with one of full attention without positions:
`["kimi-linear"] * 3 + ["softmax(rotary=False)"]`.

Source: kimi-linear, arXiv 2510.26692.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear import Recurrent
from saccade.parts.linear.gates import Gate, NoGate, SoftplusGate
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.strength import WriteStrength


@register
@dataclass(frozen=True, kw_only=True)
class KimiLinear(Mixer):
    """conv: width of the short convolution in tokens, 0 for none. gate: "channel" (KDA), "token" (one number per head: gated DeltaNet)
    or "none" (DeltaNet with an output gate). rank: of the gates' projections (default: head_dim)."""

    conv: int = 4
    gate: Literal["channel", "token", "none"] = "channel"
    rank: int | None = None

    info = Info(slug="kimi-linear", phase="mixer", needs=frozenset({"training"}), variants=({"gate": "token", "conv": 0},))

    def __post_init__(self) -> None:
        if self.conv < 0 or (self.rank is not None and self.rank < 1):
            raise ValueError(f"conv={self.conv}, rank={self.rank}: give a width in tokens (0 for none) and a rank of at least 1")
        if self.gate not in ("channel", "token", "none"):
            raise ValueError(f"gate={self.gate!r} is not 'channel', 'token' or 'none'")

    def build(self, shape: MixerShape) -> TokenMixer:
        rank = self.rank or shape.head_dim
        gate: Gate = NoGate()
        if self.gate != "none":
            gate = SoftplusGate(shape.dim, shape.heads, shape.head_dim if self.gate == "channel" else None, rank)
        return Recurrent(
            shape, conv=self.conv, q_map="unit", k_map="unit", gate=gate, strength=WriteStrength(shape.dim, shape.heads),
            normaliser=OutputNorm(shape.heads, shape.head_dim), scale=None,
            out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "sigmoid", rank),
        )  # fmt: skip
