"""Exact attention of a few query rows, summed along columns and diagonals, without the rows being held."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import check_attention_inputs
from saccade.ops.estimate import cpu, reference
from saccade.ops.estimate.common import Impl, check_scale, check_softcap, in_torch, kernel_limits, note, rows_first, use_triton


class RowSums(NamedTuple):
    """columns: `(B, Hq, Nk)`, attention that each key gets. diagonals: `(B, Hq, Nk)` or None, attention to the key o before the query, for
    each offset o. lse: `(B, Hq, m)`, log-sum-exp of each row's logits, -inf for a row that sees no key. float32 (float64)."""

    columns: Tensor
    diagonals: Tensor | None
    lse: Tensor


def row_sums(
    q: Tensor, k: Tensor, positions: int | Tensor | None = None, *, diagonals: bool = False, causal: bool = True,
    scale: float | None = None, softcap: float | None = None, impl: Impl = "auto",
) -> RowSums:  # fmt: skip
    """Softmax rows of the queries q `(B, Hq, m, D)` over the keys k `(B, Hk, Nk, D)`, summed over the rows.

    positions: where the rows stand among the keys: an int for the first of m consecutive rows, int64 `(m,)` for any rows in any order,
    None for the last m positions. A row sees the keys up to its position; with `causal=False` all of them.
    diagonals: also sum along `position - key`; the rows must be consecutive then, and causal.
    Two passes over the keys; memory grows with m + Nk (times m / 64 for diagonals).

    Sources: minference, arXiv 2407.02490, algorithm 2 (the last 64 rows); sampleattention, arXiv 2406.15486, section 4 (rows at a stride).
    """
    check_attention_inputs(q, k, k)
    m, n = q.shape[2], k.shape[2]
    given = positions if isinstance(positions, Tensor) else None
    first = n - m if positions is None else positions
    if given is not None and (given.shape != (m,) or given.is_floating_point() or given.device != q.device):
        raise ValueError(
            f"row_sums: positions are {given.dtype} {tuple(given.shape)} on {given.device}: expected integers ({m},) on {q.device}"
        )
    if diagonals and (given is not None or not causal):
        raise ValueError("row_sums: diagonals need consecutive causal rows: pass the position of the first one as an int")
    scale, cap = check_scale("row_sums", scale, q.shape[-1]), check_softcap("row_sums", softcap)
    fast, plain = use_triton("row_sums", impl, q, kernel_limits(q)), in_torch(impl, q)
    note("row_sums", "triton" if fast else plain, q, m, n)
    if fast and q.numel() and k.numel():
        from saccade.ops.estimate.triton import lse as lse_kernels
        from saccade.ops.estimate.triton import rows

        q, k = rows_first(q), rows_first(k)
        start = 0 if isinstance(first, Tensor) else first
        lse = lse_kernels.row_lse(q, k, given, start, causal, scale, cap)
        columns, along = rows.row_sums(q, k, lse, given, start, causal, scale, cap, diagonals)
        return RowSums(columns, along if diagonals else None, lse)
    if not causal:
        limits = torch.full((m,), n, device=q.device)
    else:
        limits = given + 1 if given is not None else torch.arange(m, device=q.device) + int(first) + 1
    return RowSums(*(cpu if plain == "cpu" else reference).row_sums(q, k, limits, int(first) if diagonals else None, scale, cap))
