"""From the chosen columns and diagonals of a head to what each of its query tiles reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.estimate import reference_lists
from saccade.ops.estimate.common import Impl, check_block, note, use_triton


class SlashLists(NamedTuple):
    """starts: of disjoint tiles of `block` keys, `(B, H, Tq, M)`. tokens: single keys outside them, `(B, H, Tq, M')`. Both int32,
    ascending, past the end of a list n_k."""

    starts: Tensor
    tokens: Tensor


def slash_lists(columns: Tensor, offsets: Tensor, ends: Tensor, *, block: int, n_k: int, impl: Impl = "auto") -> SlashLists:
    """The key tiles that cover the chosen diagonals of every query tile, and the chosen columns that lie in none of them.

    columns `(B, H, C)`: chosen keys, offsets `(B, H, O)`: chosen distances of a query to a key, int32, ascending, each once, past the end
    of a row n_k. ends `(Tq,)` int64: one past the last position of each tile of `block` queries, as if the last tile were whole.
    A query tile lists no column at or after its end.

    The tiles of a query tile are laid from the left: each begins where a diagonal leaves the tiles before it, or where the last of them
    ends. Seen from the query tile, where a tile stands decides where the next one does, by a table that all query tiles of a head share.
    Their lists are not shared: each walk through the table begins where the tile's furthest visible diagonal is, or at the first key,
    which cuts the diagonals in another phase, and only a gap of a whole block among the offsets brings two walks together. So the
    kernel takes all walks side by side, a thread each, and looks for columns afterwards. The host waits for the device once, for
    the lengths of the longest lists.

    Source: minference, arXiv 2407.02490, algorithm 2. Raises TypeError and ValueError for lists that don't fit.
    """
    _check(columns, offsets, ends, block, n_k)
    heads = torch.broadcast_shapes(columns.shape[:2], offsets.shape[:2])
    columns, offsets = columns.expand(*heads, -1), offsets.expand(*heads, -1)
    unsupported = None if n_k < 1 << 30 else f"the kernel takes fewer than 2^30 keys, not {n_k}"
    fast = use_triton("slash_lists", impl, columns, unsupported)
    note("slash_lists", "triton" if fast else "reference", columns, min(n_k, len(ends) * block), n_k)
    if fast and columns.shape[0] * columns.shape[1] * len(ends):
        from saccade.ops.estimate.triton import slash_lists as kernels

        columns, offsets, ends = columns.contiguous(), offsets.contiguous(), ends.contiguous()
        below, before, lengths = kernels.measure(columns, offsets, ends, n_k, block)
        # who makes a Selection of the lists asks the device whether its tiles are aligned, so one more question costs little
        most, singles = lengths.amax((1, 2, 3)).tolist()
        return SlashLists(*kernels.fill(columns, below, before, ends, n_k, block, most, singles))
    return SlashLists(*reference_lists.slash_lists(columns, offsets, ends, block, n_k))


def _check(columns: Tensor, offsets: Tensor, ends: Tensor, block: int, n_k: int) -> None:
    check_block("slash_lists", "block", block)
    if isinstance(n_k, bool) or not isinstance(n_k, int) or n_k < 1:
        raise ValueError(f"slash_lists: n_k={n_k!r} is not a whole number of keys from 1 on")
    for name, x, shape, dtype in (("columns", columns, "(B, H, C)", torch.int32), ("offsets", offsets, "(B, H, O)", torch.int32)):
        if not isinstance(x, Tensor) or x.dtype != dtype or x.ndim != 3:
            given = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"slash_lists: {name} are {given}: expected int32 {shape}, ascending ids filled up with n_k")
    if not isinstance(ends, Tensor) or ends.dtype != torch.int64 or ends.ndim != 1:
        given = f"{ends.dtype} {tuple(ends.shape)}" if isinstance(ends, Tensor) else type(ends).__name__
        raise TypeError(f"slash_lists: ends are {given}: expected int64 (query tiles,)")
    if any(a != b and 1 not in (a, b) for a, b in zip(columns.shape[:2], offsets.shape[:2], strict=True)):
        raise ValueError(f"slash_lists: columns {tuple(columns.shape)} and offsets {tuple(offsets.shape)} are of different heads")
    if not columns.device == offsets.device == ends.device:
        raise ValueError(
            f"slash_lists: columns are on {columns.device}, offsets on {offsets.device} and ends on {ends.device}: put them on one device"
        )
