"""Which entries stay where every row and head may keep its own number of them."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(
    scores: Tensor, counts: Tensor | int, *, sinks: int = 0, recent: Tensor | int = 0, valid: Tensor | None = None
) -> Tensor:
    """Place of each of n slots when `counts` of them may stay: int64 `(B, H, n)`, 0 for the best.

    scores `(B, H, n)`; counts, recent: integers that broadcast to `(B, H, 1)`. The first `sinks` and last `recent` slots come first, as
    in `parts.keep.best_slots`: out of the count, sinks before the newest. Ties go to the lower slot. valid: bool `(B, H, n)` with the
    gaps at the end, or None; gaps come last.
    """
    n = scores.shape[-1]
    slots = torch.arange(n, device=scores.device)
    held = torch.tensor(n, device=scores.device) if valid is None else valid.sum(-1, keepdim=True)
    room = torch.minimum(torch.as_tensor(counts, device=scores.device), held)
    first = room.clamp(max=sinks)
    newest = torch.minimum(torch.as_tensor(recent, device=scores.device), room - first)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill((slots < first) | (slots >= held - newest), torch.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid, -torch.inf)
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, slots.expand_as(order))


def staying(
    scores: Tensor, counts: Tensor | int, *, sinks: int = 0, recent: Tensor | int = 0, valid: Tensor | None = None
) -> Tensor:
    """The slots that stay, bool `(B, H, n)`: the `counts` best of `ranks`."""
    stay = ranks(scores, counts, sinks=sinks, recent=recent, valid=valid) < torch.as_tensor(counts, device=scores.device)
    return stay if valid is None else stay & valid


def slots_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of a bool mask `(B, H, n)` in ascending order: indices int64 `(B, H, m)`, and how many of these m each head has, `(B,
    H)`.

    m is the largest number; what a head lacks is filled with slots that are not chosen. In the form that `StoredKV.keep` takes.
    """
    counts = chosen.sum(-1)
    order = torch.sort((~chosen).to(torch.uint8), dim=-1, stable=True).indices
    return order[..., : int(counts.max())], counts
