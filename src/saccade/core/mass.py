"""Attention mass covered by a Selection, exactly, without an N x N map in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core.layout import over_groups

if TYPE_CHECKING:
    from saccade.core.selection import Selection

ROWS = 256  # query rows whose full probabilities are held at a time


def covered_mass(selection: Selection, q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """Share of each query row's softmax probability on the selected keys, float32 `(B, Hq, n_q)`; rows without a visible key give 1.

    q `(B, Hq, n_q, D)`, k `(B, Hk, n_k, D)`. Work is that of dense attention: a measurement, not part of any method.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, n_q, _ = q.shape
    group = heads // k.shape[1]
    keys = torch.arange(selection.n_k, device=q.device)
    coverage = selection.expand(batch, heads).coverage()
    out = torch.empty(batch, heads, n_q, device=q.device)
    for begin in range(0, n_q, ROWS):
        rows = torch.arange(begin, min(begin + ROWS, n_q), device=q.device)
        q_rows = q[:, :, rows].float().unflatten(1, (-1, group))
        logits = over_groups(q_rows, k.float().mT).flatten(1, 2) * factor
        if selection.causal:
            logits = logits.masked_fill(keys > (rows + selection.offset)[:, None], -torch.inf)
        seen = (logits > -torch.inf).any(-1)
        weights = torch.softmax(logits.masked_fill(~seen.unsqueeze(-1), 0.0), dim=-1)
        kept = coverage[:, :, rows // selection.block_q]
        out[:, :, rows] = torch.where(seen, (weights * kept).sum(-1), 1.0)
    return out
