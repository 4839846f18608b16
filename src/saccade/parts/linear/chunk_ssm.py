"""A selective state space model that starts anew in every chunk."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.ops.scan import scan
from saccade.parts.linear.gates import heads_first


class ChunkSSM(nn.Module):
    """`S_t = e^(-a d_t) S_{t-1} + d_t b_t u_t^T`, `y_t = W_o (silu(z_t) (c_t S_t + w u_t))`, S = 0 where a chunk begins.

    u, z `(dim,)`, b, c `(states,)` for all heads and the step d = softplus(...) for each head are projections of the token, in the manner
    of Mamba-2; a and w are learned for each head. Source: attamba.
    """

    def __init__(self, dim: int, heads: int, states: int) -> None:
        super().__init__()
        self.heads, self.splits = heads, [dim, dim, states, states, heads]
        self.in_proj, self.out_proj = nn.Linear(dim, sum(self.splits), bias=False), nn.Linear(dim, dim, bias=False)
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.exp(torch.rand(heads) * math.log(100.0) + math.log(0.001))
        self.step_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))
        self.skip = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, begins: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y `(B, N, dim)`, the state after the last token) of x `(B, N, dim)`; begins `(N,)` bool: where chunks begin."""
        u, z, b, c, step = self._parts(x)
        log_decay = (-self.a_log.to(step.dtype).exp()[:, None] * step).masked_fill(begins, float("-inf"))
        read, after = scan(c, b * step.unsqueeze(-1), u, log_decay=log_decay, scale=1.0, initial_state=state)
        assert isinstance(after, Tensor)
        return self._finish(read, u, z, x), after

    def naive(self, x: Tensor, begins: Tensor) -> Tensor:
        """y of a whole sequence, with all N x N weights inside chunks written out."""
        u, z, b, c, step = self._parts(x)
        total = (-self.a_log.to(step.dtype).exp()[:, None] * step).cumsum(-1)
        number = begins.cumsum(0)
        inside = (number[:, None] == number).tril()
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~inside, float("-inf")).exp()
        return self._finish((c @ b.mT * decay * step.unsqueeze(-2)) @ u, u, z, x)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """u `(B, H, N, D)`, z `(B, N, dim)`, b, c `(B, 1, N, states)`, steps `(B, H, N)`, in float32 at least but for z."""
        wide = torch.promote_types(x.dtype, torch.float32)
        u, z, b, c, step = self.in_proj(x).split(self.splits, dim=-1)
        step = F.softplus(step.to(wide) + self.step_bias.to(wide)).mT
        return heads_first(u, self.heads).to(wide), z, b.to(wide).unsqueeze(1), c.to(wide).unsqueeze(1), step

    def _finish(self, read: Tensor, u: Tensor, z: Tensor, x: Tensor) -> Tensor:
        y = (read + self.skip.to(u.dtype)[:, None, None] * u).transpose(1, 2).flatten(2).to(x.dtype)
        return self.out_proj(F.silu(z) * y)
