"""TransNormerLLM: gated linear attention with a decay in every layer and linearised relative positions in the first.

    q, k = silu(W x),   v = W_v x,   u = W_u x
    a_ts = sum_c q_tc k_sc cos((t - s) theta_c) lambda^(t-s),   lambda = exp(-slope_h (1 - l / L))
    y_t = W_o (norm(sum_{s<=t} a_ts v_s over all heads) * u_t),   the norm without weights

The cosine is made of twice the features (LRPE: [q cos(t theta), q sin(t theta)]), theta learned per head and channel. The recurrence
S_t = lambda S_{t-1} + k_t v_t^T is the one that does not overflow; the layer is lightning attention's apart from LRPE. The formula of the
slopes differs between the paper ("linear") and its code ("alibi"): see `lightning_slopes`. Its feed-forward layer, SGLU
`(x W_1 * x W_2) W_3`, and the norms around are a block's affair.

Source: transnormerllm, arXiv 2307.14995.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.lightning_attention import LightningAttention
from saccade.parts.linear import Recurrent
from saccade.parts.linear.lrpe import Lrpe
from saccade.parts.linear.slopes import lightning_slopes


@register
@dataclass(frozen=True, kw_only=True)
class TransNormerLLM(Mixer):
    """lrpe: layers with relative positions, "first", "all" or "none". slopes: "alibi" (the released models), "linear" (the paper) or
    "none" (no decay)."""

    lrpe: Literal["first", "all", "none"] = "first"
    slopes: Literal["alibi", "linear", "none"] = "alibi"

    info = Info(
        slug="transnormerllm", phase="mixer", needs=frozenset({"training"}),
        variants=({"lrpe": "all", "slopes": "linear"}, {"slopes": "none"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        lightning_slopes(1, 0, 1, self.slopes)
        if self.lrpe not in ("first", "all", "none"):
            raise ValueError(f"lrpe={self.lrpe!r} is not 'first', 'all' or 'none'")

    def build(self, shape: MixerShape) -> TokenMixer:
        made = LightningAttention(slopes=self.slopes).build(shape)
        assert isinstance(made, Recurrent)
        if self.lrpe == "all" or (self.lrpe == "first" and shape.layer == 0):
            made.placed = "after"
            made.rotary = Lrpe(shape.kv_heads, shape.head_dim)  # pyright: ignore[reportAttributeAccessIssue]
        return made
