"""The selective state space of Mamba: every channel has a small state of its own that forgets by how long a step the token takes.

    u = silu(conv(x)),   (d, B, C) = W_x u, each with an RMS norm,   D_t = softplus(W_d d + b)        a step for each channel
    h_t = exp(D_t A) h_{t-1} + D_t B_t u_t,    A = -exp(A_log) < 0        h has `state` numbers a channel
    y_t = C_t . h_t + w u_t

One channel is a head of `ops.scan` with values of width 1; B and C are the keys and queries that all channels share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call
from saccade.ops.scan import scan
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.quadratic import quadratic

Recur = Callable[..., tuple[Tensor, Any]]


class SelectiveState(nn.Module):
    """width: channels of x. state: numbers kept for each channel. rank: of the steps' projection. conv: width of the short convolution in
    tokens. A starts at -1 ... -state, steps start between 0.001 and 0.1."""

    def __init__(self, width: int, state: int, rank: int, conv: int) -> None:
        super().__init__()
        self.sizes = [rank, state, state]
        self.conv = ShortConv(width, conv, "silu", bias=True)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for size in self.sizes)
        self.step_proj = nn.Linear(rank, width)
        self.step_proj.keeps_init = True  # pyright: ignore[reportArgumentType] (models that set up their maps alike leave this one)
        step = torch.exp(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        with torch.no_grad():
            self.step_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.step_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.a_log = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        """(y `(B, N, width)`, what to keep: "conv" `(B, conv - 1, width)` and "s" `(B, width, state, 1)`) of x `(B, N, width)`."""
        u, tail = self.conv(x, past.get("conv"), call.lengths)
        y, state = self._run(u, call, lambda *given, **options: scan(
            *given, **options, initial_state=past.get("s"), return_state=call.keep
        ))  # fmt: skip
        return y, {"conv": tail, "s": state} if call.keep else {}

    def naive(self, x: Tensor, call: Call) -> Tensor:
        """y of a whole sequence, with the weight of every token for every other written out."""
        return self._run(self.conv(x)[0], call, lambda *given, **options: (quadratic(*given, **options), None))[0]

    def _run(self, u: Tensor, call: Call, recur: Recur) -> tuple[Tensor, Any]:
        wide = torch.promote_types(u.dtype, torch.float32)
        parts = self.x_proj(u).split(self.sizes, dim=-1)
        low, write, read = (norm(part) for norm, part in zip(self.norms, parts, strict=True))
        step = F.softplus(F.linear(low, self.step_proj.weight).to(wide) + self.step_proj.bias.to(wide)).mT
        # channels are heads: (B, width, N, state) and (B, width, N, 1)
        log_decay = call.masked(-self.a_log.to(wide).exp()[:, None] * step.unsqueeze(-1))
        written = (step * u.mT.to(wide)).unsqueeze(-1)
        keys, queries = call.masked(write.to(wide).unsqueeze(1)), read.to(wide).unsqueeze(1)
        out, state = recur(queries, keys, written, log_decay=log_decay, scale=1.0)
        return out.squeeze(-1).mT.to(u.dtype) + self.skip * u, state
