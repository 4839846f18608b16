"""Exponentials of keys that don't overflow: a maximum is taken off, which a normalised read cancels."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Call
from saccade.parts.linear.gates import Gate, Gated


class RunningMaxGate(Gate):
    """Keys as logits k: `key'_t = exp(k_t - m_t)`, `log g_t = m_{t-1} - m_t`, m the largest entry of the head's keys so far.

    The state is the sum of `exp(k)` in units of `exp(m)`. Keeps m `(B, H)`. bidirectional: m over all tokens, and no decay.
    """

    def __init__(self, bidirectional: bool = False) -> None:
        super().__init__()
        self.bidirectional = bidirectional

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        logits = keys.to(torch.promote_types(keys.dtype, torch.float32))
        largest = call.masked(logits.detach().amax(-1), -1e30)
        if self.bidirectional:
            shift = largest.amax(-1, keepdim=True)
            return Gated(None, call.masked((logits - shift.unsqueeze(-1)).clamp(max=0).exp()))
        before = largest[..., :1] if carry is None else carry.to(largest.dtype).unsqueeze(-1)
        now = torch.maximum(largest.cummax(-1).values, before)
        decay = torch.cat([before, now[..., :-1]], dim=-1) - now
        return Gated(decay, (logits - now.unsqueeze(-1)).clamp(max=0).exp(), now[..., -1])
