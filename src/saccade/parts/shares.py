"""Shares of attention estimated from centroids, and one threshold on them for many heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST, WIDTH, BINS = -40.0, 0.05, 800  # natural logs of shares: from e^-40, below which they count as that, to 1


def centroid_logits(q: Tensor, centroids: Tensor, scale: float) -> Tensor:
    """q `(B, Hq, N, D)` with centroids `(B, Hk, c, D)` of their key heads, scaled: `(B, Hq, N, c)` in the centroids' dtype or wider."""
    exact = torch.promote_types(q.dtype, centroids.dtype)
    heads = centroids.shape[1]
    rows = q.to(exact).reshape(q.shape[0], heads, q.shape[1] // heads * q.shape[2], q.shape[3])
    return (rows @ centroids.to(exact).mT).mul_(scale).view(*q.shape[:3], centroids.shape[2])


def key_shares(logits: Tensor, counts: Tensor) -> Tensor:
    """log of `S_i = exp(l_i) / sum_j N_j exp(l_j)`: the share of one key of cluster i; counts `(B, H, c)` broadcast over axis 2.

    logits `(B, Hq, N, c)`, H dividing Hq; -inf for clusters that are out, which stay -inf.
    """
    total = (logits + by_query_head(counts, logits).log()).logsumexp(-1, keepdim=True)
    return torch.where(logits > -torch.inf, logits - total, -torch.inf)


def by_query_head(counts: Tensor, logits: Tensor) -> Tensor:
    """counts `(B, H, c)` for each query head of logits `(B, Hq, N, c)`: `(B, Hq, 1, c)` in their dtype."""
    return counts.to(logits.dtype).repeat_interleave(logits.shape[1] // counts.shape[1], dim=1).unsqueeze(2)


def share_histogram(shares: Tensor, counts: Tensor) -> Tensor:
    """How many keys, of all heads and queries, have which log share: shares `(B, Hq, N, c)`, counts `(B, H, c)` to float64 `(B, BINS)`."""
    bins = ((shares.double() - LOWEST) / WIDTH).clamp(0, BINS - 1).long().flatten(1)
    weights = by_query_head(counts.double(), shares.double()).expand(shares.shape).flatten(1)
    return torch.zeros(shares.shape[0], BINS, dtype=torch.float64, device=shares.device).scatter_add_(1, bins, weights)


def share_quantile(histograms: Sequence[Tensor], budget: float) -> Tensor:
    """The log share that at most `budget` of the keys of all these histograms `(B, BINS)` exceed: float64 `(B,)`, to within WIDTH."""
    total = torch.stack(list(histograms)).sum(0)
    above = total.flip(-1).cumsum(-1).flip(-1)
    # rounding of sums must not let a budget of 1 drop the lowest bin
    too_many = above > budget * above[:, :1] * (1 + 1e-9)
    return LOWEST + WIDTH * too_many.sum(-1).double() - torch.where(too_many[:, 0], 0.0, torch.inf)
