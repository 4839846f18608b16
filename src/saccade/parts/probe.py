"""Probing the attention map: exact softmax rows of a few queries, and what they say about columns and diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64  # rows whose probabilities are held at a time where only their sum is wanted


def last_rows(n_q: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The last `count` of n_q query rows (all where there are fewer), int64, ascending."""
    return torch.arange(max(0, n_q - count), n_q, device=device)


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


def column_mass(q: Tensor, k: Tensor, rows: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Attention that the given query rows (ascending) pay to each key, summed over the rows: `(B, Hq, Nk)`.

    The same numbers as `row_probabilities(...).sum(-2)`, but only `ROWS` rows are ever held, over the keys that they see.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = torch.zeros(*q.shape[:2], n_k, dtype=exact, device=q.device)
    for chunk in rows.split(ROWS):
        seen = int(chunk[-1]) + n_k - n_q + 1
        # cutting the newest keys and queries off together keeps the rows at their positions
        part = row_probabilities(q[:, :, : seen - n_k + n_q], k[:, :, :seen], chunk, scale=scale, softcap=softcap)
        total[..., :seen] += part.sum(-2)
    return total


def diagonal_mass(probabilities: Tensor) -> Tensor:
    """Sums along the diagonals of the last m rows of a causal map: `(..., m, n)` to `(..., n)`, entry o for keys o before their query.

    Row r stands at position `n - m + r`; the sum runs over the rows that reach that far back.
    """
    m, n = probabilities.shape[-2:]
    # with m - 1 columns put in front, entry (r, c + r) of all rows r lies on one diagonal: o = n - 1 - c
    padded = torch.nn.functional.pad(probabilities, (m - 1, 0)).contiguous()
    width = n + m - 1
    strides = [*padded.stride()[:-2], width + 1, 1]
    return padded.as_strided([*padded.shape[:-2], m, n], strides).sum(-2).flip(-1)
