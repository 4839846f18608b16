"""Choosing which cache entries stay: one rule for budgets, protected entries, heads and ties."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import StoredKV


def best_slots(scores: Tensor, count: int, *, sinks: int = 0, recent: int = 0, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The `count` best of n slots per row and head, ascending: indices `(B, H, count)` int64, and counts `(B, H)` where `valid` is
    given and some head has fewer.

    scores `(B, H, n)`. The first `sinks` and last `recent` slots come out of the count first. Ties go to the lower slot.
    """
    n = scores.shape[-1]
    count = min(count, n)
    scores = scores.float()
    if valid is None:
        forced = torch.arange(n, device=scores.device)
        forced = (forced < sinks) | (forced >= n - recent)
        scores = scores.masked_fill(forced, torch.inf)
        chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
        return chosen.sort(-1).values, None
    held = valid.sum(-1, keepdim=True)
    slots = torch.arange(n, device=scores.device)
    scores = scores.masked_fill((slots < sinks) | ((slots >= held - recent) & (slots < held)), torch.inf)
    chosen = torch.sort(scores.masked_fill(~valid, -torch.inf), dim=-1, descending=True, stable=True).indices[..., :count]
    # gaps stand at the end, so in ascending order a head's real picks come first
    return chosen.sort(-1).values, held.squeeze(-1).clamp(max=count)


def keep_best(kv: StoredKV, scores: Tensor, count: int, *, sinks: int = 0, recent: int = 0) -> None:
    """Keep the `count` entries with the highest scores `(B, Hk, n)` in every head of `kv`; nothing happens if all fit.

    Where a model stores one latent for all heads the scores are averaged over the heads.
    """
    if count >= kv.length:
        return
    if kv.heads != scores.shape[1]:
        scores = scores.float().unflatten(1, (kv.heads, -1)).mean(2)
    kv.keep(*best_slots(scores, count, sinks=sinks, recent=recent, valid=kv.valid))
