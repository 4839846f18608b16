"""Low-rank factors of the keys of all heads together.

The keys of a token, all heads side by side, are a row of X `(n, Hk D)`. Its best approximation of rank r is A B with the first r right
singular vectors of X as the rows of B and A = X B^T (the same product as U_r times S_r V_r^T). Heads share A, and each has its own
columns of B. Source: shadowkv, arXiv 2410.21465, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 8192  # tokens turned to float64 at a time


def joint_factors(keys: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors `(B, 1, n, r)` and bases `(B, Hk, r, D)` of keys `(B, Hk, n, D)`, in the dtype of the keys; r = min(rank, n, Hk D).

    The singular vectors are those of X^T X, summed and decomposed in float64: the work grows with n (Hk D)^2 and needs no copy of X.
    """
    batch, heads, n, dim = keys.shape
    rank = min(rank, n, heads * dim)
    moment = keys.new_zeros(batch, heads * dim, heads * dim, dtype=torch.float64)
    for piece in keys.split(PIECE, dim=2):
        rows = piece.transpose(1, 2).flatten(2).to(torch.float64)
        moment += rows.mT @ rows
    basis = torch.linalg.eigh(moment).eigenvectors.flip(-1)[..., :rank]  # (B, Hk D, r), ordered by decreasing share
    exact = torch.promote_types(keys.dtype, torch.float32)
    factors = [piece.transpose(1, 2).flatten(2).to(exact) @ basis.to(exact) for piece in keys.split(PIECE, dim=2)]
    joined = torch.cat([piece.to(keys.dtype) for piece in factors], dim=1)
    return joined.unsqueeze(1), basis.mT.unflatten(-1, (heads, dim)).transpose(1, 2).to(keys.dtype).contiguous()
