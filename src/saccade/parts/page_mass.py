"""Pages by the attention they receive: weights of single keys summed up page by page."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.pick import pick_best


def page_sums(weights: Tensor, page: int) -> Tensor:
    """Sums `(..., ceil(n / page))` of weights `(..., n)` over pages of `page` keys; the last page may hold fewer."""
    return torch.nn.functional.pad(weights, (0, -weights.shape[-1] % page)).unflatten(-1, (-1, page)).sum(-1)


def best_pages(sums: Tensor, count: int, recent: int) -> Tensor:
    """The last `recent` pages and the best others by sums `(..., P)`, `count` in all: ascending int64 `(..., count)`.

    Where the count is too small for the recent ones, it is the last `count` pages. Ties go to the lower page.
    """
    recent = min(recent, count)
    held = sums.shape[-1] - recent
    last = torch.arange(held, sums.shape[-1], device=sums.device).expand(*sums.shape[:-1], recent)
    if count == recent:
        return last
    return torch.cat([pick_best(sums[..., :held], count - recent), last], dim=-1)
