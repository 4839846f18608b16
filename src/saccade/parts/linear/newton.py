"""Inverses by Newton's iteration: products alone, and a gradient that needs no unrolling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def newton_inverse(p: Tensor, steps: int = 20, guard: float = 0.9) -> Tensor:
    """`P^-1` of symmetric positive definite p `(..., m, m)` with entries of at least 0.

        V_0 = a P,   a = 2 guard / (largest row sum of P)^2,   V <- 2 V - V P V

    The residual `I - P V` is squared in every step; guard below 1 keeps the first one below 1. Few steps leave the inverse of a badly
    conditioned P unfinished. The gradient, `-Y^T dY Y^T`, is that of the finished inverse.
    """
    return _Newton.apply(p, steps, guard)  # pyright: ignore[reportReturnType]


class _Newton(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, steps: int, guard: float) -> Tensor:
        y = p * (2 * guard / p.sum(-1).amax(-1)[..., None, None] ** 2)
        for _ in range(steps):
            y = 2 * y - y @ p @ y
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (y,) = ctx.saved_tensors
        return -y.mT @ grads[0] @ y.mT, None, None
