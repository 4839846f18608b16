"""Many small symmetric positive definite systems, solved through their products alone, and differentiated without unrolling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Product = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Product, b: Tensor, *, diagonal: Tensor | None = None, steps: int | None = None, tolerance: float | None = None
) -> Tensor:
    """x with `product(x) = b`, for each row of b `(..., D)` a system of its own; no gradient.

    product: `A x` of x `(..., D)`, A symmetric positive definite per row. diagonal `(..., D)`: of A, for a Jacobi preconditioner.
    steps: at most so many (default `2 D + 8`). tolerance: a row stands still once its residual is so small relative to b
    (default: 4 machine epsilons).
    """
    tolerance = 4 * torch.finfo(b.dtype).eps if tolerance is None else tolerance
    with torch.no_grad():
        x, r = torch.zeros_like(b), b.detach().clone()
        z = r if diagonal is None else r / diagonal
        p, rz = z, (r * z).sum(-1, keepdim=True)
        enough = (r.square().sum(-1, keepdim=True)) * tolerance**2
        for _ in range(2 * b.shape[-1] + 8 if steps is None else steps):
            moving = r.square().sum(-1, keepdim=True) > enough
            if not bool(moving.any()):
                break
            ap = product(p)
            curve = (p * ap).sum(-1, keepdim=True)
            moving = moving & (curve > 0)
            length = torch.where(moving, rz / curve.masked_fill(~moving, 1.0), 0.0)
            x, r = x + length * p, r - length * ap
            z = r if diagonal is None else r / diagonal
            new = (r * z).sum(-1, keepdim=True)
            p, rz = z + torch.where(moving, new / rz.masked_fill(~moving, 1.0), 0.0) * p, new
    return x


def solve(product: Product, b: Tensor, **options: Any) -> Tensor:
    """`conjugate_gradients` with a gradient: to b, and through `product` to what it is made of, by one more solve in the backward pass."""
    x = conjugate_gradients(product, b, **options)
    if not torch.is_grad_enabled():
        return x
    # d x = A^-1 (d b - d A x), and b - A x is 0 in value
    return _Implicit.apply(b - product(x), x, lambda g: conjugate_gradients(product, g, **options))  # pyright: ignore[reportReturnType]


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, inverse: Product) -> Tensor:
        ctx.inverse = inverse
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return ctx.inverse(grads[0]), None, None
