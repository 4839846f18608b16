"""Tensor powers as features: the Taylor series of the exponential, to any order."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from saccade.parts.linear.features import FeatureMap


class TensorPowers(FeatureMap):
    """`phi(q) . phi(k) = sum_{n <= order} s^n / n!` with `s = scale q.k`: all products of up to `order` channels, each once, with the root
    of its multinomial weight: `C(D + order, order)` features, in float32 at least. scale: default `D ** -0.5`."""

    def __init__(self, dim: int, order: int, scale: float | None = None) -> None:
        super().__init__()
        if order < 0:
            raise ValueError(f"order={order} of tensor powers: give at least 0")
        self.order, self.scale = order, dim**-0.5 if scale is None else scale
        for n in range(1, order + 1):
            chosen = list(combinations_with_replacement(range(dim), n))
            weights = [math.prod(math.factorial(one.count(i)) for i in set(one)) ** -0.5 for one in chosen]
            self.register_buffer(f"index{n}", torch.tensor(chosen), persistent=False)
            self.register_buffer(f"weight{n}", torch.tensor(weights, dtype=torch.float64), persistent=False)

    def width(self, dim: int) -> int:
        return math.comb(dim + self.order, self.order)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * math.sqrt(self.scale)
        parts = [torch.ones_like(x[..., :1])]
        for n in range(1, self.order + 1):
            weight = self.get_buffer(f"weight{n}").to(x.dtype)
            parts.append(x[..., self.get_buffer(f"index{n}")].prod(-1) * weight)
        return torch.cat(parts, dim=-1)
