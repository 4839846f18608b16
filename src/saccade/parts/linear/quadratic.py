"""The recurrences of `saccade.ops.scan` as one matrix of weights over the whole sequence: the oracle of the recurrent layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    normalise: Literal["sum"] | None = None,
) -> Tensor:  # fmt: skip
    """`out = A v`, A `(B, H, N, N)` lower triangular; arguments as in `saccade.ops.scan.scan`, without a state before.

        without beta:  A_ij = scale sum_c q_ic k_jc e^(G_ic - G_jc),  G the running sums of the log decays
        with beta:     A = A_q (I + tril(diag(beta) A_k, -1))^-1 diag(beta),  A_q and A_k as above of (q, k) and (k, k)

    Time and memory grow with N^2, with N^2 D for gates per channel.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    q, k, v = (x.to(wide).repeat_interleave(heads // x.shape[1], 1) for x in (q, k, v))
    n = q.shape[2]
    lower = torch.ones(n, n, dtype=torch.bool, device=q.device).tril()
    read = _products(q * (q.shape[-1] ** -0.5 if scale is None else scale), k, log_decay, lower)
    if beta is not None:
        strength = beta.to(wide).unsqueeze(-1)
        system = (strength * _products(k, k, log_decay, lower)).tril(-1) + torch.eye(n, dtype=wide, device=q.device)
        v = torch.linalg.solve_triangular(system, strength * v, upper=False, unitriangular=True)
    out = read @ v
    if normalise:
        total = read.sum(-1, keepdim=True)
        out = out / total.masked_fill(total == 0, float("inf"))
    return out


def _products(rows: Tensor, k: Tensor, log_decay: Tensor | None, lower: Tensor) -> Tensor:
    n = rows.shape[2]
    if log_decay is None:
        return (rows @ k.mT).masked_fill(~lower, 0.0)
    g = log_decay.to(rows.dtype)
    if g.ndim == 1:
        distance = torch.arange(n, device=g.device)[:, None] - torch.arange(n, device=g.device)
        return (rows @ k.mT) * torch.exp(g[:, None, None] * distance.clamp(min=0)).masked_fill(~lower, 0.0)
    total = g.cumsum(2)
    if g.ndim == 3:
        between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, float("-inf"))
        return (rows @ k.mT) * between.exp()
    between = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(~lower[..., None], float("-inf"))
    return torch.einsum("bhic,bhjc,bhijc->bhij", rows, k, between.exp())
