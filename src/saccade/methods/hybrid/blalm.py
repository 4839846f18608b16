"""BLaLM: an mLSTM in the place of attention, with a short convolution and a window of softmax attention beside it.

    q, k, v = silu(conv(W x)),   optionally q, k -> [softmax(W' q), softmax(-W' q)]  (hedgehog; D is then twice as large)
    a = W_i x + b_i,  log f = logsigmoid(W_f x + b_f),  m_t = max(log f_t + m_{t-1}, a_t)
    C_t = e^(log f_t + m_{t-1} - m_t) C_{t-1} + e^(a_t - m_t) k_t v_t^T D^-1/2,   n_t the same of the keys alone
    h_t = norm(sigmoid(W_o x_t) * q_t C_t / max(|q_t . n_t|, e^(-m_t)))           norm per head
    s_t = softmax attention of q over k, v of the last `window` tokens             before the hedgehog map
    y_t = W_y (g * h_t + (1 - g) * s_t),    g = sigmoid(W_g x_t) per channel       join="add": h_t + g * s_t

The floor e^(-m) is 1 in the units before the running maximum m is taken off. Gate formulas and window are inferred, as the card says.
The paper trains matrices with Muon (`saccade.train.muon`) and tables, norms and gates with AdamW.

Source: blalm, arXiv 2511.05560.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.ops.scan import scan
from saccade.parts.linear import Recurrent, partial_softmax, quadratic
from saccade.parts.linear.gates import StabilisedGate, heads_first
from saccade.parts.linear.normalise import MaxStabilised, OutputNorm
from saccade.parts.linear.recurrent import Recur
from saccade.parts.linear.window import attend_window


@register
@dataclass(frozen=True, kw_only=True)
class BLaLM(Mixer):
    """window: tokens the attention branch sees, the query's own among them. join: "gate" (g h + (1 - g) s), "add" (h + g s) or "none" (the
    mLSTM alone). conv: width of the short convolution in tokens, 0 for none. hedgehog: learned positive maps of the mLSTM's q and k."""

    window: int = 128
    join: Literal["gate", "add", "none"] = "gate"
    conv: int = 4
    hedgehog: bool = False

    info = Info(
        slug="blalm", phase="mixer", needs=frozenset({"training"}), tiny={"window": 16},
        variants=({"window": 8, "join": "add", "hedgehog": True}, {"join": "none", "conv": 0}, {"window": 1, "conv": 0}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.window < 1 or self.conv < 0:
            raise ValueError(f"window={self.window}, conv={self.conv}: give at least 1 token, and a width in tokens (0 for no convolution)")
        if self.join not in ("gate", "add", "none"):
            raise ValueError(f"join={self.join!r} is not 'gate', 'add' or 'none'")

    def build(self, shape: MixerShape) -> TokenMixer:
        return BLaLMMixer(shape, self)


class BLaLMMixer(Recurrent):
    """The layer: one projection and convolution, read by both branches."""

    def __init__(self, shape: MixerShape, method: BLaLM) -> None:
        # one input and one forget gate for each pair of key and value heads
        kind = "hedgehog" if method.hedgehog else "identity"
        super().__init__(
            shape, conv=method.conv, q_map=kind, k_map=kind, gate=StabilisedGate(shape.dim, shape.kv_heads), normaliser=MaxStabilised(),
            scale=None,
        )  # fmt: skip
        self.method = method
        inner = shape.heads * shape.head_dim
        self.open_proj = nn.Linear(shape.dim, inner)
        self.head_norm = OutputNorm(shape.heads, shape.head_dim)
        self.join_proj = None if method.join == "none" else nn.Linear(shape.dim, inner)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, k, v, kept = self.project(x, past, call)
        memory, state, level = self.remember(x, q, k, v, past, call, lambda *given, **options: scan(
            *given, **options, initial_state=past.get("s"), impl=self.impl, return_state=call.keep
        ))  # fmt: skip
        if self.join_proj is None:
            local, near = None, {}
        else:
            local, near = attend_window(q, k, v, past.get("near", {}), call, window=self.method.window)
        return self.merge(memory, local, x), {**kept, "s": state, "gate": level, "near": near} if call.keep else {}

    def naive(self, x: Tensor) -> Tensor:
        call, n = self.whole(x), x.shape[1]
        q, k, v, _ = self.project(x, {}, call)
        memory, _, _ = self.remember(x, q, k, v, {}, call, lambda *given, **options: (quadratic(*given, **options), None))
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)
        seen = (j <= i) & (i - j < self.method.window)
        return self.merge(memory, None if self.join_proj is None else partial_softmax(q, k, v, seen).out.to(x.dtype), x)

    def remember(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call, recur: Recur
    ) -> tuple[Tensor, Any, Tensor | None]:
        """(h `(B, H, N, D)`, the state, the last m `(B, Hk)`) of the mLSTM."""
        q, k = self.features(q, k, call)
        gated, v, _ = self.write(x, k, v, past, call)
        log_decay, level = gated.log_decay, gated.level
        assert log_decay is not None and level is not None
        group = self.heads // self.kv_heads
        decay = call.masked(log_decay).repeat_interleave(group, 1)
        out, state = recur(q, call.masked(gated.keys), v, log_decay=decay, scale=self.scale)
        out = self.normaliser.after(out, call, level.repeat_interleave(group, 1)).to(x.dtype)
        out = out * heads_first(self.open_proj(x), self.heads).sigmoid()
        return self.head_norm.after(out, call, None), state, gated.carry

    def merge(self, memory: Tensor, local: Tensor | None, x: Tensor) -> Tensor:
        if local is None or self.join_proj is None:
            return self.finish(memory, x)
        gate = heads_first(self.join_proj(x), self.heads).sigmoid()
        return self.finish(memory + gate * local if self.method.join == "add" else gate * memory + (1 - gate) * local, x)
