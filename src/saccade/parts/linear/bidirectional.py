"""Linear attention without order: every token reads all of them, through one product of keys and values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

RowNorm = Literal["sum", "mean", "affine", "divisive", "none"]


def bidir_linear(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, normaliser: RowNorm = "sum", *, real: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """`(B, H, N, Dv)` of phi_q, phi_k `(B, H, N, F)` and v `(B, H, N, Dv)`, with scores `s_ij = phi_q_i . phi_k_j`.

    normaliser, the weight of value j for query i, n being the number of real tokens:
        "sum": `s_ij / (sum_j s_ij + eps)`;
        "mean": `s_ij / n`;
        "affine": `(1 + 1 / S_i) s_ij - S_i / n`, S_i the sum of the row (plus eps): rows sum to 1, weights may be negative (mala);
        "divisive": `s_ij - S_i / n + 1 / n`: rows sum to 1 (inline);
        "none": `s_ij`.
    real: `(B, N)` bool, tokens that count; the output of the others is 0.
    Raises ValueError for an unknown normaliser.
    """
    if real is not None:
        phi_k = phi_k.masked_fill(~real[:, None, :, None], 0.0)
        v = v.masked_fill(~real[:, None, :, None], 0.0)
        n = real.sum(-1).to(v.dtype).clamp(min=1)[:, None, None, None]
    else:
        n = torch.full((1, 1, 1, 1), float(v.shape[2]), dtype=v.dtype, device=v.device)
    out = phi_q @ (phi_k.mT @ v)
    if normaliser != "none" and normaliser != "mean":
        total = phi_q @ phi_k.sum(2, keepdim=True).mT
        if normaliser == "sum":
            out = out / (total + eps)
        elif normaliser == "affine":
            out = (1 + 1 / (total + eps)) * out - total / n * v.sum(2, keepdim=True)
        elif normaliser == "divisive":
            out = out + (1 - total) / n * v.sum(2, keepdim=True)
        else:
            raise ValueError(f"normaliser {normaliser!r} is not known: use 'sum', 'mean', 'affine', 'divisive' or 'none'")
    elif normaliser == "mean":
        out = out / n
    return out if real is None else out.masked_fill(~real[:, None, :, None], 0.0)
