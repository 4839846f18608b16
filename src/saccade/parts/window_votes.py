"""Votes of an observation window: how much the newest queries look at each older entry (SnapKV, 2404.14469)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.parts.probabilities import probabilities


def window_votes(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, valid: Tensor | None = None,
    kernel: int = 1, pooling: Literal["average", "max"] = "average", behind: int | None = None,
) -> Tensor:  # fmt: skip
    """Pooled votes `(B, Hk, n)`, float32: softmax over all n entries, summed over the queries, pooled, mean over the
    query group.

    q `(B, Hq, w, D)` belongs to the newest w tokens, k `(B, Hk, n, D)`. The newest `behind` entries (default w) get no
    votes: 0 there, also while pooling. kernel: odd width of the pooling over positions, stride 1; 1 leaves the votes as
    they are. valid as in `probabilities`.
    """
    newest = q.shape[2] if behind is None else behind
    n, heads = k.shape[2], k.shape[1]
    votes = torch.zeros(k.shape[0], heads, n, device=k.device)
    if valid is not None:
        valid = valid.expand(-1, heads, -1)
    held = n if valid is None else valid.sum(-1)[:, :, None]
    old = torch.arange(n, device=k.device) < held - newest
    group = q.shape[1] // heads
    # head by head: w rows of float32 weights over a long cache are large
    for h in range(heads):
        mine = slice(h, h + 1)
        weights = probabilities(
            q[:, h * group : (h + 1) * group], k[:, mine], scale=scale, softcap=softcap,
            valid=None if valid is None else valid[:, mine],
        )  # fmt: skip
        received = weights.sum(3)[:, 0].float()
        received = torch.where(old if valid is None else old[:, mine], received, 0.0)
        votes[:, h] = _pooled(received, kernel, pooling).mean(1)
    return torch.where(old, votes, 0.0)


def _pooled(x: Tensor, kernel: int, pooling: str) -> Tensor:
    if kernel == 1:
        return x
    pool = F.avg_pool1d if pooling == "average" else F.max_pool1d
    return pool(x, kernel, stride=1, padding=kernel // 2)
