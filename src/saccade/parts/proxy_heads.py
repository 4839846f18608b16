"""A few averaged heads that stand for all."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_heads(slug: str, q: Tensor, k: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean queries `(B, groups, Nq, D)` and mean keys `(B, min(groups, Hk), Nk, D)` of equal runs of heads, in the dtype of q.

    q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`. Groups hold whole groups of key/value heads or share one: ValueError for other counts.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads % groups or (kv_heads % groups and groups % kv_heads):
        raise ValueError(
            f"{slug}(groups={groups}) does not divide {heads} query heads into equal groups that keep the {kv_heads} key/value heads "
            "whole or split them evenly: choose a divisor"
        )
    return _mean(q, groups), _mean(k, groups) if kv_heads % groups == 0 else k


def _mean(x: Tensor, groups: int) -> Tensor:
    if x.shape[1] == groups:
        return x
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.unflatten(1, (groups, -1)).mean(2, dtype=exact).to(x.dtype)
