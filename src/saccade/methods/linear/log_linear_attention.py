"""Log-linear attention: one state for each bucket of a Fenwick tree over the past, each read with a weight that depends on the token.

    O = (A * M) V,   A: the weights of the host (Mamba-2, or gated DeltaNet in its WY form),   M_ts = lambda_t^(level(t, s))
    lambda_t^(l) = softplus(scale_hl (W x_t)_hl) >= 0
    S^(l): of the bucket with 2^(l-1) tokens; all are moved by the host's transition, the new token is level 0, full buckets merge upwards

The near past is kept apart finely, the far past coarsely: log2(T) + 1 states. With all lambda = 1, or one level, it is the host.

    host="mamba-2":          S_t = g_t S_{t-1} + step_t k_t v_t^T,   log g_t = -exp(A) step_t,   q, k, v = silu(conv(W x))
    host="gated-deltanet":   S_t = g_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,   q, k of length 1
    y_t = W_o (silu(W_z x_t) * norm(o_t))

Source: log-linear-attention, arXiv 2506.04761.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear import Recurrent, quadratic
from saccade.parts.linear.fenwick import fenwick, level
from saccade.parts.linear.gates import Gated, SoftplusGate, heads_first
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.strength import WriteStrength


@register
@dataclass(frozen=True, kw_only=True)
class LogLinearAttention(Mixer):
    """host: "mamba-2" or "gated-deltanet". levels: of the tree, the last holds all that would lie higher; default: as many as max_length
    (65536 where none is given) has, `ceil(log2 T) + 1`. conv: width of the short convolution in tokens, 0 for none."""

    host: Literal["mamba-2", "gated-deltanet"] = "mamba-2"
    levels: int | None = None
    conv: int = 4

    info = Info(
        slug="log-linear-attention", phase="mixer", needs=frozenset({"training"}),
        variants=({"host": "gated-deltanet"}, {"levels": 4, "conv": 0}, {"levels": 1, "host": "gated-deltanet"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.host not in ("mamba-2", "gated-deltanet"):
            raise ValueError(f"host={self.host!r} is not 'mamba-2' or 'gated-deltanet'")
        if self.conv < 0 or (self.levels is not None and self.levels < 1):
            raise ValueError(f"conv={self.conv}, levels={self.levels}: give a width in tokens (0 for none) and at least 1 level, or None")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LogLinearMixer(shape, self, self.levels or ((shape.max_length or 65536) - 1).bit_length() + 1)


class LogLinearMixer(Recurrent):
    """The host's layer, with a weight for every token, head and level."""

    def __init__(self, shape: MixerShape, method: LogLinearAttention, levels: int) -> None:
        delta = method.host == "gated-deltanet"
        super().__init__(
            shape, conv=method.conv, q_map="unit" if delta else "identity", k_map="unit" if delta else "identity",
            gate=SoftplusGate(shape.dim, shape.heads), strength=WriteStrength(shape.dim, shape.heads) if delta else None,
            normaliser=OutputNorm(shape.heads, shape.head_dim), scale=None,
            out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "silu"),
        )  # fmt: skip
        self.levels = levels
        self.level_proj = nn.Linear(shape.dim, shape.heads * levels, bias=False)
        self.level_scale = nn.Parameter(torch.ones(shape.heads, 1, levels))

    def level_weights(self, x: Tensor) -> Tensor:
        """lambda `(B, H, N, L)`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return nn.functional.softplus(self.level_scale.to(wide) * heads_first(self.level_proj(x), self.heads).to(wide))

    def write(self, x: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Gated, Tensor, Tensor | None]:
        gated, v, beta = super().write(x, k, v, past, call)
        if beta is None and gated.log_decay is not None and isinstance(self.gate, SoftplusGate):
            # Mamba-2 writes as much as it forgets: the step stands in both
            step = -gated.log_decay / self.gate.a_log.to(gated.log_decay.dtype).exp()[:, None]
            v = (v.repeat_interleave(self.heads // v.shape[1], dim=1) * step.unsqueeze(-1)).to(v.dtype)
        return gated, v, beta

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        lam = self.level_weights(x)

        def recur(q: Tensor, k: Tensor, v: Tensor, *, normalise: None, **host: Any) -> tuple[Tensor, Tensor]:
            return fenwick(q, k, v, lam, past.get("s"), call, impl=self.impl, **host)

        y, states, kept = self._run(x, past, call, recur)
        return y, kept | {"s": states} if call.keep else kept

    def naive(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        order = torch.arange(n, device=x.device)
        lam = self.level_weights(x)
        mask = lam.gather(-1, level(order[:, None], order, self.levels).expand(*lam.shape[:2], -1, -1))

        def recur(q: Tensor, k: Tensor, v: Tensor, **host: Any) -> tuple[Tensor, None]:
            weights = quadratic(q, k, torch.eye(n, dtype=q.dtype, device=x.device).expand(x.shape[0], 1, -1, -1), **host)
            values = v.to(weights.dtype).repeat_interleave(self.heads // v.shape[1], dim=1)
            return ((weights * mask) @ values).to(q.dtype), None

        return self._run(x, {}, self.whole(x), recur)[0]
