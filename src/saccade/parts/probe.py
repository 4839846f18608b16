"""Probing the attention map: which query rows stand for all, and exact softmax rows of a few queries."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64  # rows whose probabilities are held at a time where only their sum is wanted


def strided_rows(n_q: int, share: float, device: torch.device | str = "cpu") -> Tensor:
    """`ceil(share * n_q)` query rows at a constant distance, counted from the last one, which is always among them; ascending."""
    # 0.07 * 100 is 7.000000000000001 in binary: rounding first keeps the ceiling where a reader expects it
    count = min(n_q, max(1, -int(-round(share * n_q, 9) // 1)))
    return n_q - 1 - torch.arange(count - 1, -1, -1, device=device) * n_q // count


def row_probabilities(q: Tensor, k: Tensor, rows: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Causal softmax of some query rows over all keys, float32 (float64 for float64 inputs) `(B, Hq, m, Nk)`.

    q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`, rows `(m,)` int64 indices into q. The queries are the last Nq of the Nk positions.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    n_k, kv_heads = k.shape[2], k.shape[1]
    # the queries of a group become rows over their key/value head: keys are not repeated
    picked = (q[:, :, rows].to(exact) * scale).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = (picked @ k.to(exact).mT).unflatten(2, (-1, rows.shape[0])).flatten(1, 2)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    positions = rows + n_k - q.shape[2]
    # every row sees the keys up to the first row's position
    first = int(positions.min()) + 1 if rows.numel() else n_k
    future = torch.arange(first, n_k, device=q.device) > positions.unsqueeze(-1)
    logits[..., first:].masked_fill_(future, -torch.inf)
    return torch.softmax(logits, dim=-1)
