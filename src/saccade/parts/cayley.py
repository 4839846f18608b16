"""Orthogonal matrices without a constraint: the Cayley transform of any square matrix.

    A = X - X^T,   U = (I - A/2)^-1 (I + A/2),        back: A = 2 (U - I)(U + I)^-1

U is orthogonal for every X. The way back needs U without an eigenvalue -1: `signed` turns the signs of U's columns so that it has none,
which leaves the spaces that its first columns span as they are. Source: matryoshkakv, arXiv 2410.14731; that such signs exist for every
orthogonal matrix is a classical fact, and the elimination below finds them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(x: Tensor) -> Tensor:
    """The orthogonal `(..., D, D)` of x `(..., D, D)`, float32 (float64 for float64), with gradients."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    half, eye = (x - x.mT) / 2, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(eye - half, eye + half)


def inverse_cayley(basis: Tensor) -> Tensor:
    """The strictly lower triangular x `(..., D, D)` float64 with `cayley(x)` = basis, an orthogonal matrix that `signed` gave."""
    basis = basis.to(torch.float64)
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device)
    skew = 2 * torch.linalg.solve(basis + eye, basis - eye, left=False)
    return ((skew - skew.mT) / 2).tril(-1)


def signed(basis: Tensor) -> Tensor:
    """Orthogonal `(..., D, D)` with columns times 1 or -1, so that U + I can be inverted; then U has determinant 1 too.

    Column by column, U + I is eliminated without exchanging rows; the sign is the one that makes the pivot 1 + |w|, at least 1.
    """
    work = basis.to(torch.float64).clone()
    signs = torch.ones(basis.shape[:-2] + basis.shape[-1:], dtype=torch.float64, device=basis.device)
    for j in range(basis.shape[-1]):
        pivot = work[..., j, j]
        signs[..., j] = torch.where(pivot < 0, -1.0, 1.0)
        share = work[..., j + 1 :, j] * (signs[..., j] / (1 + pivot.abs())).unsqueeze(-1)
        work[..., j + 1 :, j + 1 :] -= share.unsqueeze(-1) * work[..., j, None, j + 1 :]
    return basis * signs.to(basis.dtype).unsqueeze(-2)
