"""Delta correction: what a sparse output lacks at a few rows is added to the rows after them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.lists import KeyLists, run_tiles


def anchor_rows(n: int, gamma: int, tail: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows to be computed densely, int64 ascending: every gamma-th from 0 on, and all of the last `n % gamma + max(tail, gamma)`."""
    begin = max(0, n - n % gamma - max(tail, gamma))
    return torch.cat([torch.arange(0, begin, gamma, device=device), torch.arange(begin, n, device=device)])


def reading_all(positions: Tensor, n_k: int, block: int = 64) -> Selection:
    """Everything up to `positions (m,)`, the ascending places of some rows, for attention with `q_positions=positions[None, None]`.

    Tiles of `block` of these rows by tiles of `block` keys; a query tile ends with the keys of its last row. B and H are 1.
    """
    m = positions.shape[0]
    last = torch.arange(block, m + block, block, device=positions.device).clamp(max=m) - 1
    ends = (positions[last] + 1).clamp(max=n_k)
    lists = run_tiles(torch.zeros_like(ends), ends, block, n_k)[None, None]
    return KeyLists(lists, lists[..., :0]).selection(n_q=m, n_k=n_k, block=block)


def correct(sparse: Tensor, dense: Tensor, rows: Tensor, how: Literal["delta", "recompute"] = "delta") -> Tensor:
    """`sparse (B, H, n, Dv)` with its rows `rows (m,)` replaced by `dense (B, H, m, Dv)`, the same dtype.

    "delta": each row in between also gets the difference `dense - sparse` (float32, float64 for float64) of the last one of `rows`
    at or before it; row 0 is among them. "recompute": the rows in between stay as they are.

    Source: delta-attention, arXiv 2505.11254, equation 5.
    """
    if how == "recompute":
        return sparse.index_copy(2, rows, dense)
    exact = torch.float64 if sparse.dtype == torch.float64 else torch.float32
    lacking = dense.to(exact) - sparse[:, :, rows].to(exact)
    places = torch.arange(sparse.shape[2], device=sparse.device)
    before = torch.searchsorted(rows, places, right=True) - 1
    # the rows themselves are dense to the bit, not to rounding
    return (sparse.to(exact) + lacking[:, :, before]).to(sparse.dtype).index_copy(2, rows, dense)
