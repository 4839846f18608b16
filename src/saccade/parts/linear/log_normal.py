"""The log-normal view of attention weights: how widely softmax's spread, and what exponential features must be to spread alike.

    softmax:      log w_ij = q_i . k_j D^-1/2              variance s2 = var(q) var(k)
    features:     log w_ij = log sum_c exp(alpha q_ic + beta k_jc)    variance about a t2 + b,  t2 = alpha^2 var(q) + beta^2 var(k)

Source: linear-log-normal.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LEAST = 1e-3  # of t2, where softmax is flatter than the fit reaches


@lru_cache
def log_variance_fit(dim: int) -> tuple[float, float]:
    """(a, b) for heads of so many channels: regression on Gaussian draws where the variance lies between 0.4 and 8."""
    draws = torch.randn(2, 256, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = []
    for t2 in torch.linspace(0.5, 48.0, 96, dtype=torch.float64):
        q, k = (t2 / 2).sqrt() * draws
        variance = (q.exp() @ k.exp().T).log().var()
        if 0.4 <= variance <= 8:
            points.append(torch.stack([t2, variance]))
    t2, variance = torch.stack(points).unbind(1)
    a = ((t2 - t2.mean()) * (variance - variance.mean())).sum() / (t2 - t2.mean()).square().sum()
    return float(a), float(variance.mean() - a * t2.mean())


def matched(var_q: Tensor, var_k: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(alpha `(..., H)`, beta `(..., Hk)`) with which exponential features spread as softmax does: var_q `(..., H)` and var_k `(..., Hk)`
    variances over tokens and channels. Heads that share keys share beta, matched to their mean."""
    a, b = log_variance_fit(dim)
    group = var_q.unflatten(-1, (var_k.shape[-1], -1))
    s2 = group.mean(-1) * var_k
    t2 = ((s2 - b) / a).clamp(min=LEAST)
    alpha = ((t2 / 2).sqrt().unsqueeze(-1) / group.clamp(min=1e-12).sqrt()).flatten(-2)
    return alpha, (t2 / 2).sqrt() / var_k.clamp(min=1e-12).sqrt()


def spread(x: Tensor, real: Tensor | None, over_batch: bool) -> Tensor:
    """Variance of x `(B, H, N, D)` over tokens and channels, `(B, H)`, or over the batch too, `(H,)`; real: `(B, N)` bool, who counts."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = torch.ones_like(x[:, :1, :, :1]) if real is None else real[:, None, :, None].to(x.dtype)
    axes = (0, 2, 3) if over_batch else (2, 3)
    total = (weight.expand(-1, -1, -1, x.shape[-1])).sum(axes, keepdim=True).clamp(min=1)
    mean = (x * weight).sum(axes, keepdim=True) / total
    return (((x - mean).square() * weight).sum(axes, keepdim=True) / total).reshape((-1, x.shape[1]) if not over_batch else (-1,))


def temperature(q: Tensor, k: Tensor) -> float:
    """`1 / (std(q) std(k))`: the smaller, the more concentrated softmax attention of q and k is."""
    return float((spread(q, None, True).mean() * spread(k, None, True).mean()).rsqrt())


def row_entropy(weights: Tensor) -> Tensor:
    """Mean entropy in nats of the rows of `(..., N, N)`."""
    return -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1).mean(-1)


def spectral_gap(weights: Tensor) -> Tensor:
    """`1 - |lambda_2|` of `(..., N, N)` whose rows sum to 1: near 1 where attention spreads, near 0 where tokens keep to themselves."""
    return 1 - torch.linalg.eigvals(weights).abs().sort(dim=-1).values[..., -2]
