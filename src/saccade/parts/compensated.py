"""Softmax attention weights of the entries above a threshold, and the repair of what was dropped."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """mask: bool, like the logits: what was kept. weights: 0 elsewhere; a row's sum is below 1 by what it lost."""

    mask: Tensor
    weights: Tensor


def last_of(mask: Tensor, count: int) -> Tensor:
    """The last `count` True entries of each row of `mask (..., n)`."""
    after = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return mask & (after <= count)


def above(scores: Tensor, theta: Tensor, open_rows: Tensor, cap: int | None = None) -> Tensor:
    """Entries of scores `(..., n)` above `theta (..., 1)`, the last `cap` of them; all that are above -inf in open rows `(..., 1)`."""
    kept = scores > theta
    kept = kept if cap is None else last_of(kept, cap)
    return torch.where(open_rows, scores > -torch.inf, kept)


def kept_before(logits: Tensor, mask: Tensor, dropped: Tensor | str | None, theta: Tensor, factor: float = 1.0) -> Kept:
    """Softmax over the kept logits alone, with an estimate R of the dropped exponentials in its denominator.

    logits `(..., n)`, -inf where a key is not visible. weights = e_i / (sum of kept e + factor * R), e_i = exp(logit_i - row maximum).
    dropped: R, `(..., 1)`, relative to the row maximum; or "exact": the sum over what was dropped; or "exp": their number times
    exp(theta - maximum); None: 0.
    """
    highest = logits.amax(-1, keepdim=True)
    e = (logits - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
    lost = (logits > -torch.inf) & ~mask
    if isinstance(dropped, str):
        # a dropped logit is at most theta, and never above the maximum, whatever the threshold
        estimate = (theta - highest).clamp(max=0).exp() * lost.sum(-1, keepdim=True)
        dropped = (e * lost).sum(-1, keepdim=True) if dropped == "exact" else estimate
    e = e * mask
    total = e.sum(-1, keepdim=True)
    total = total if dropped is None else total + factor * torch.where(lost.any(-1, keepdim=True), dropped, 0.0)
    return Kept(mask, e / total.clamp(min=torch.finfo(e.dtype).tiny))


def nearest_entry(known: Tensor, wanted: Tensor) -> Tensor:
    """For each of `wanted` (int64, any shape) the place of the nearest number in ascending `known (G,)`, ties to the smaller."""
    middles = (known[1:] + known[:-1]).double() / 2
    return torch.searchsorted(middles, wanted.double())
