"""Principal directions of keys from their second moment, head by head; the mean is not subtracted."""

from __future__ import annotations

import torch
from torch import Tensor


def second_moment(keys: Tensor) -> Tensor:
    """`sum_t k_t k_t^T` over batch and tokens of keys `(B, H, N, D)`: `(H, D, D)` float64, adds up over samples."""
    exact = keys.to(torch.float64).transpose(0, 1).flatten(1, 2)
    return exact.mT @ exact


def principal_basis(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonal bases of second moments `(H, D, D)`, and how much the first columns hold.

    Returns the bases `(H, D, D)` float32, columns by decreasing variance, each with its largest entry positive; and
    the share of the total variance that the first d columns hold, `(H, D)` float32, ascending to 1.
    """
    variance, basis = torch.linalg.eigh(moment.to(torch.float64))
    variance, basis = variance.flip(-1).clamp(min=0), basis.flip(-1)
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    total = variance.cumsum(-1)
    explained = total / total[..., -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return basis.float().contiguous(), explained.float()


def dims_for(explained: Tensor, target: float) -> int:
    """The smallest d whose explained share (`(H, D)`, as above) reaches `target` in every head."""
    missing = (explained < target).sum(-1)
    return min(int(missing.max()) + 1, explained.shape[-1])
