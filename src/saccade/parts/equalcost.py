"""Making candidates comparable: scaling their sizes until they cost the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def largest_within(target: Tensor, cost: Callable[[Tensor], Tensor], base: Tensor, *, least: Tensor, most: int) -> Tensor:
    """The sizes `base (S,)` times the largest factor, head by head, whose `cost` stays within `target`.

    target: `(B, H)`; cost: sizes `(B, H, S)` int64 to `(B, H)`, taken to grow with the sizes. Sizes stay in [least `(S,)`, most];
    the smallest of them are the answer where even they cost too much. The factor is found to 1/64 below 16, in eleven evaluations.
    """

    def sizes(factor: Tensor) -> Tensor:
        return torch.maximum((factor.unsqueeze(-1) * base).floor().long().clamp(max=most), least)

    factor = torch.zeros(target.shape, dtype=torch.float64, device=target.device)
    for power in range(4, -7, -1):
        trial = factor + 2.0**power
        factor = torch.where(cost(sizes(trial)) <= target, trial, factor)
    return sizes(factor)
