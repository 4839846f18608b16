"""Choosing the best of scored things: one rule for counts, masses and ties.

How many a budget keeps is `Budget.counts` (a Mass keeps the entry that crosses the target); which ones is decided here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Budget, Mass, Threshold


def ranks(scores: Tensor) -> Tensor:
    """0 for the highest score of each row of `(..., n)`, 1 for the next, and so on: int64; of equal scores the first comes first."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def choose(scores: Tensor, budget: Budget | float | int | Mass | Threshold) -> Tensor:
    """Which entries of `scores (..., n)` a budget keeps, bool; entries of -inf are never kept, ties go to the lower position.

    For a Mass the scores are non-negative weights. Mass(1) keeps every entry, those of weight 0 too, so that it opens fully.
    """
    there = scores > -torch.inf
    budget = Budget.of(budget)
    if isinstance(budget.amount, Mass) and budget.amount.share == 1:
        return there
    return there & (ranks(scores) < budget.counts(scores).unsqueeze(-1))
