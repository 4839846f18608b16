"""Thresholds fitted head by head: the first of a falling row that is good enough, and bisection on a monotone test."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def halvings(start: float, floor: float) -> list[float]:
    """`start, start / 2, start / 4, ...` as long as they are above `floor`. ValueError unless 0 < floor < start."""
    if not 0 < floor < start:
        raise ValueError(f"halving from {start} down to {floor}: both must be positive and the start above the floor")
    found = [start]
    while found[-1] / 2 > floor:
        found.append(found[-1] / 2)
    return found


def first_within(values: Tensor, candidates: list[float], errors: Tensor, bound: Tensor | float) -> Tensor:
    """The first candidate of each row whose error is below the bound, `values` where there is none.

    errors `(..., C)` belong to the C candidates; values, bound: broadcastable to `(...)`. Returns float64 `(...)`.
    """
    good = errors < torch.as_tensor(bound, device=errors.device).unsqueeze(-1)
    table = torch.tensor(candidates, dtype=torch.float64, device=errors.device).expand(errors.shape)
    first = torch.gather(table, -1, good.int().argmax(-1, keepdim=True)).squeeze(-1)
    return torch.where(good.any(-1), first, values.to(first))


def bisect(good: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int) -> Tensor:
    """The smallest value between low and high for which `good` holds, entry by entry, to `(high - low) / 2^steps`.

    good: float64 values to bool, same shape; taken to hold from some value on and at `high`, which is never tried. low, high: float64 of
    one shape. The answer is a value that was tried and good, or high.
    """
    if steps < 1 or low.shape != high.shape:
        raise ValueError(f"bisect takes bounds of one shape and at least one step, not {tuple(low.shape)}, {tuple(high.shape)}, {steps}")
    for _ in range(steps):
        middle = (low + high) / 2
        holds = good(middle)
        low, high = torch.where(holds, low, middle), torch.where(holds, middle, high)
    return high
