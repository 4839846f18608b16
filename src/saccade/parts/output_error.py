"""How far the output of attention moves when entries are removed (caote, 2504.14051).

With weights alpha that sum to 1 and output o = sum_j alpha_j v_j, the others grow by 1 / (1 - alpha_j) when j goes, so

    c_j = |o - o without j| = alpha_j / (1 - alpha_j) |o - v_j|,        c_E = |sum_{j in E} alpha_j (o - v_j)| / (1 - sum_{j in E}
    alpha_j)
"""

from __future__ import annotations

import torch
from torch import Tensor


def output_error(scores: Tensor, values: Tensor, alive: Tensor | None = None, *, fast: bool = False) -> Tensor:
    """c_j of every entry, `(B, H, n)`, float32 (float64 for float64 values).

    scores `(B, H, n)`, at least 0, become weights by dividing by their sum; values `(B, H, n, Dv)`; alive bool `(B, H, n)`: the entries
    that are still there (default all), the others count nothing and get 0. fast: the plain mean of the values stands for o (FastCAOTE).
    """
    exact = torch.promote_types(values.dtype, torch.float32)
    there = torch.ones_like(scores, dtype=torch.bool) if alive is None else alive
    alpha, values = weights_of(scores.to(exact) * there), values.to(exact)
    share = there / there.sum(-1, keepdim=True).clamp(min=1) if fast else alpha
    output = share.to(exact).unsqueeze(2) @ values
    # one entry may hold all the weight
    alpha = alpha.clamp(max=1 - torch.finfo(exact).eps)
    return alpha / (1 - alpha) * (values - output).norm(dim=-1)


def joint_output_error(scores: Tensor, values: Tensor, gone: Tensor) -> Tensor:
    """c_E of the entries `gone`, bool `(B, H, n)`: `(B, H)`. Arguments as in `output_error`; some entry with weight must stay."""
    exact = torch.promote_types(values.dtype, torch.float32)
    alpha, values = weights_of(scores.to(exact)), values.to(exact)
    output = alpha.unsqueeze(2) @ values
    moved = (alpha * gone).unsqueeze(2) @ (output - values)
    return moved.squeeze(2).norm(dim=-1) / (1 - (alpha * gone).sum(-1))


def weights_of(scores: Tensor) -> Tensor:
    """Scores `(..., n)` of at least 0 divided by their sum; all 0 stay 0."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
