"""Keys and values in another order, with their positions, so that causality is still known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.parts.rows import pick_rows


class Permuted(NamedTuple):
    """k `(B, H, N, D)`, v `(B, H, N, Dv)` in a new order, positions int64 `(B, H, N)`: where each came from."""

    k: Tensor
    v: Tensor
    positions: Tensor


def segment_order(importance: Tensor, segment: int) -> Tensor:
    """Key ids by falling importance `(B, H, m)` inside each run of `segment`, int64 `(B, H, m)`; m is a multiple of the segment.

    No key leaves its segment, so all keys of earlier segments stay earlier. Ties keep their order.
    """
    if importance.shape[-1] % segment:
        raise ValueError(f"{importance.shape[-1]} keys are no whole number of segments of {segment}: leave the rest out")
    runs = importance.unflatten(-1, (-1, segment))
    inside = torch.sort(runs, dim=-1, descending=True, stable=True).indices
    first = torch.arange(0, importance.shape[-1], segment, device=importance.device)
    return (inside + first.unsqueeze(-1)).flatten(-2)


def permute(k: Tensor, v: Tensor, order: Tensor) -> Permuted:
    """k `(B, Hk, N, D)` and v `(B, Hk, N, Dv)` with the first m keys in the order `(B, H, m)` and the rest as they were.

    H is Hk, or a multiple of it: then each of the H heads holds its own copy of the keys of its key/value head.
    """
    n, kv_heads = k.shape[2], k.shape[1]
    rest = torch.arange(order.shape[-1], n, device=k.device).expand(*order.shape[:2], -1)
    positions = torch.cat([order, rest], dim=-1)
    share = order.shape[1] // kv_heads
    ids = positions.unflatten(1, (kv_heads, share)).flatten(2, 3)
    k, v = (pick_rows(x, ids).unflatten(2, (share, n)).flatten(1, 2) for x in (k, v))
    return Permuted(k, v, positions)
