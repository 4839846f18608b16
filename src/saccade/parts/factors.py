"""Low-rank factors of a projection y = x W, all heads side by side: codes of r numbers a token, and what restores y from them.

ASVD, with s_i the mean |x_i| at the projection's input and S = diag(s^alpha):

    S W = U Sig V^T,   A = S^-1 U_r Sig_r^0.5,   B = Sig_r^0.5 V_r^T,      code c = x A,   y' = c B

W V_r = S^-1 U_r Sig_r, so that c = y E with E = V_r Sig_r^-0.5: the code can be worked out from y alone, without x. The same holds for
the factors of least squared error over samples, E = B^T = the principal directions of y. Source: cskv, arXiv 2409.10593, section 3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """down `(C, r)`: entry to code, E. up `(r, C)`: code to entry, B. C = heads * channels."""

    down: Tensor
    up: Tensor


def joint_rank(density: float, dim: int, heads: int) -> int:
    """`floor(density * dim) * heads`; ValueError where nothing is left."""
    kept = int(density * dim + 1e-9)
    if not kept:
        raise ValueError(f"a density of {density} leaves none of a head's {dim} channels: give at least {1 / dim:.3g}")
    return kept * heads


def principal_factors(moment: Tensor, rank: int) -> Factors:
    """From the second moment `(C, C)` of entries: of all factors of this rank those of least squared error, float32."""
    directions = torch.linalg.eigh(moment.to(torch.float64)).eigenvectors.flip(-1)[:, :rank]
    return Factors(directions.float().contiguous(), directions.mT.float().contiguous())


def asvd_factors(weight: Tensor, size: Tensor, rank: int, alpha: float = 0.5) -> Factors:
    """From a projection's weight W `(d, C)` and the mean |x| of its input channels `(d,)`, float32. alpha 0: the plain SVD of W.

    Directions in which S W has no extent get no code.
    """
    scaled = weight.to(torch.float64) * size.to(torch.float64).add(1e-6).pow(alpha).unsqueeze(-1)
    _, values, right = torch.linalg.svd(scaled, full_matrices=False)
    values, right = values[:rank], right[:rank]
    root = values.sqrt()
    inverse = torch.where(values > 1e-10 * values[0], 1 / root.clamp(min=torch.finfo(root.dtype).tiny), 0.0)
    down, up = (right * inverse.unsqueeze(-1)).mT, right * root.unsqueeze(-1)
    # fewer directions than the rank: the others carry nothing
    missing = rank - len(values)
    down, up = torch.nn.functional.pad(down, (0, missing)), torch.nn.functional.pad(up, (0, 0, 0, missing))
    return Factors(down.float().contiguous(), up.float().contiguous())


def beside(x: Tensor) -> Tensor:
    """Entries `(B, H, n, D)` with the heads of a token side by side, `(B, n, H * D)`."""
    return x.transpose(1, 2).flatten(2)
