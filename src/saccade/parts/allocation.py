"""Dividing one budget among layers: shares that follow given weights and stay within bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.bisect import bisect


def share_out(weights: Tensor, mean: float, *, least: float, most: float = 1.0) -> Tensor:
    """Shares `(..., L)` in proportion to positive weights `(..., L)`, each within [least, most], their mean `mean`: float64.

    What a bounded share leaves over or takes too much is made up for by the others, in their proportions, so that the total holds.
    Without a bound in the way a share is L * mean * weight / (sum of the weights). ValueError unless least <= mean <= most.
    """
    if not least <= mean <= most:
        raise ValueError(f"shares from {least} to {most} can't have the mean {mean}")
    weights = weights.double()
    total = mean * weights.shape[-1]
    plain = weights * (total / weights.sum(-1, keepdim=True))
    if bool(((plain >= least) & (plain <= most)).all()):
        return plain
    high = 2 * most / weights.amin(-1)  # there every share is at its upper bound
    # a hair below the total counts as reached, for the sum is rounded
    reached = total * (1 - 1e-12)
    scale = bisect(
        lambda factor: (weights * factor.unsqueeze(-1)).clamp(least, most).sum(-1) >= reached, torch.zeros_like(high), high, 100
    )
    return (weights * scale.unsqueeze(-1)).clamp(least, most)
