"""How much attention a selection retains, row by row: the cumulative residual attention of sampleattention, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Budget, Mass, Selection
from saccade.core.mass import covered_mass
from saccade.parts.probe import ROWS, row_probabilities


def worst_row_mass(selection: Selection, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """CRA: the least attention mass that any query row retains, `min_i sum_j P_ij M_ij`, float32 `(B, Hq)` in [0, 1].

    q `(B, Hq, n_q, D)`, k `(B, Hk, n_k, D)`. A measurement at the cost of dense attention (sampleattention, section 3).
    """
    return covered_mass(selection, q, k, scale).amin(-1)


def sparsity_degree(q: Tensor, k: Tensor, share: float, scale: float | None = None) -> Tensor:
    """SD: the largest share of the visible pairs that can go while every row retains `share` of its mass, float64 `(B, Hq)`.

    The best possible choice, pair by pair: a ceiling for every selection, at more than the cost of dense attention.
    """
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    n_q, n_k = q.shape[2], k.shape[2]
    needed = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    budget = Budget(Mass(share))
    for rows in torch.arange(n_q, device=q.device).split(ROWS):
        needed += budget.counts(row_probabilities(q, k, rows, scale=factor)).sum(-1)
    visible = n_q * n_k - n_q * (n_q - 1) // 2
    return 1 - needed / visible
