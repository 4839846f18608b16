"""Choosing which cache entries stay: one rule for budgets, protected entries, heads and ties."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import StoredKV


def best_slots(scores: Tensor, count: int, *, sinks: int = 0, recent: int = 0, valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The `count` best of n slots per row and head, ascending: indices `(B, H, count)` int64, and with `valid` how many
    of them each head has, `(B, H)`.

    scores `(B, H, n)`. The first `sinks` and last `recent` slots come out of the count first; where the count is too
    small for both, sinks go first and then the newest. Ties go to the lower slot. valid: `(B, H, n)` bool with the gaps
    at the end, or None.
    """
    n = scores.shape[-1]
    count = min(count, n)
    sinks = min(sinks, count)
    recent = min(recent, count - sinks)
    slots = torch.arange(n, device=scores.device)
    if valid is None and sinks + recent == count:
        # no entry is left to be judged
        chosen = torch.cat([slots[:sinks], slots[n - recent :]])
        return chosen.expand(*scores.shape[:2], count), None
    held = n if valid is None else valid.sum(-1, keepdim=True)
    forced = (slots < sinks) | ((slots >= held - recent) & (slots < held))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(forced, torch.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    chosen = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    # gaps stand at the end, so in ascending order a head's real picks come first
    return chosen, None if valid is None else valid.sum(-1).clamp(max=count)


def keep_best(kv: StoredKV, scores: Tensor, count: int, *, sinks: int = 0, recent: int = 0) -> None:
    """Keep the `count` entries with the highest scores `(B, Hk, n)` in every head of `kv`; nothing happens if all fit.

    Where a model stores one latent for all heads the scores are averaged over the heads.
    """
    if count >= kv.length:
        return
    if kv.valid is None and sinks + recent >= count:
        keep_ends(kv, min(sinks, count), count - min(sinks, count))
        return
    if kv.heads != scores.shape[1]:
        exact = torch.promote_types(scores.dtype, torch.float32)
        scores = scores.to(exact).unflatten(1, (kv.heads, -1)).mean(2)
    kv.keep(*best_slots(scores, count, sinks=sinks, recent=recent, valid=kv.valid))


def keep_ends(kv: StoredKV, sinks: int, recent: int) -> None:
    """Keep the first `sinks` and last `recent` entries of every head of `kv`; nothing happens if all fit. See `StoredKV.drop`."""
    gone = kv.length - sinks - recent
    if gone <= 0:
        return
    if kv.valid is None:
        kv.drop(sinks, gone)
        return
    scores = torch.zeros_like(kv.side["positions"], dtype=torch.float32)
    kv.keep(*best_slots(scores, sinks + recent, sinks=sinks, recent=recent, valid=kv.valid))


def token_places(kv: StoredKV, seen: int) -> Tensor | None:
    """Which of the `seen` tokens each entry belongs to, int64 `(B, heads, n)`, where entries between others were dropped; else None.

    None means that the entries are the last n tokens. Padding is not counted: the newest entry is the newest token.
    """
    positions = kv.side["positions"].long()
    if not kv.length or bool((positions[..., -1] - positions[..., 0] == kv.length - 1).all()):
        return None
    return positions - positions[..., -1:] + seen - 1
