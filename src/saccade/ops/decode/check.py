"""What `decode` refuses, and with which words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from saccade.core import Selection


def check_selection(selection: Selection, q: Tensor, kv_heads: int, n_k: int) -> None:
    if (selection.n_q, selection.n_k) != (q.shape[2], n_k):
        raise ValueError(
            f"the selection is over {selection.n_q} queries and {selection.n_k} keys, "
            f"q and the cache have {q.shape[2]} and {n_k}: build it for these tensors"
        )
    if selection.batch not in (1, q.shape[0]) or selection.heads not in (1, kv_heads, q.shape[1]):
        raise ValueError(
            f"the selection has batch {selection.batch} and {selection.heads} heads, not batch 1 or {q.shape[0]} "
            f"and 1, {kv_heads} or {q.shape[1]} heads"
        )
    if selection.device != q.device:
        raise ValueError(f"the selection is on {selection.device} and q on {q.device}: build it on one device")


def check_ragged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int] | Tensor, kv_heads: int | None, others: bool
) -> None:
    """others: whether a selection, lengths or a block table were given as well."""
    if kv_heads is None or kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"a ragged cache needs kv_heads dividing the {q.shape[1]} query heads, not {kv_heads}")
    if others:
        raise ValueError("a selection, lengths or block_table over a ragged cache are not supported: select before packing")
    if k.ndim != 2 or v.ndim != 2 or k.shape[0] != v.shape[0]:
        raise ValueError(f"a ragged cache has k (total, D) and v (total, Dv), not {tuple(k.shape)} and {tuple(v.shape)}")
    _check_kinds(q, k, v)
    expected = q.shape[0] * kv_heads + 1
    if isinstance(offsets, Tensor):
        if offsets.shape != (expected,) or offsets.dtype not in (torch.int32, torch.int64) or offsets.device != q.device:
            raise ValueError(
                f"offsets are {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}: expected {expected} int32 or int64 row "
                f"numbers on {q.device}"
            )
        return  # its values are not read: that would wait for the device
    if len(offsets) != expected or offsets[-1] != k.shape[0] or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(
            f"offsets must be {expected} ascending row numbers ending at {k.shape[0]}, "
            f"not {len(offsets)} ending at {offsets[-1] if len(offsets) else None}"
        )


def check_paged(q: Tensor, k: Tensor, v: Tensor, block_table: Tensor) -> None:
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[3] or k.shape[1] < 1:
        raise ValueError(
            f"a paged cache has k (pages, page, Hk, {q.shape[3]}) and v (pages, page, Hk, Dv), not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if k.shape[2] < 1 or q.shape[1] % k.shape[2]:
        raise ValueError(f"q has {q.shape[1]} heads and the pages {k.shape[2]}: the first must be a multiple of the second")
    _check_kinds(q, k, v)
    _check_int(block_table, (q.shape[0], None), "block_table", q)


def check_lengths(q: Tensor, lengths: Tensor) -> None:
    _check_int(lengths, (q.shape[0],), "lengths", q)


def _check_kinds(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (q.dtype == k.dtype == v.dtype) or not torch.is_floating_point(q):
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one floating-point dtype")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v are on {q.device}, {k.device}, {v.device}: move them to one device")


def _check_int(x: Tensor, shape: tuple[int | None, ...], name: str, q: Tensor) -> None:
    fits = isinstance(x, Tensor) and x.ndim == len(shape) and all(b in (None, a) for a, b in zip(x.shape, shape, strict=True))
    if not fits or x.dtype not in (torch.int32, torch.int64) or x.device != q.device:
        wanted = tuple("any" if s is None else s for s in shape)
        given = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {given}: expected int32 or int64 {wanted} on {q.device}")
