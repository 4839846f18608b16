"""The lists of a selection turned round: which query tiles read each key tile. The backward pass walks them."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.attend.triton.launch import Lists, list_strides
from saccade.ops.gpu import ceil_div, next_power_of_two

WIDTH = 128  # query tiles a step


@triton.jit
def turn_kernel(
    starts_ptr, counts_ptr, readers_ptr, totals_ptr, stride_sb, stride_sh, stride_st, stride_cb, stride_ch, heads, query_tiles, key_tiles,
    offset, block_q, block_k, CAUSAL: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program looks for one key tile in the sorted lists of all query tiles, by bisection in STEPS steps."""
    key_tile = tl.program_id(0)
    line = tl.program_id(1)
    batch = (line // heads).to(tl.int64)
    head = (line % heads).to(tl.int64)
    starts_ptr += batch * stride_sb + head * stride_sh
    counts_ptr += batch * stride_cb + head * stride_ch
    place = line.to(tl.int64) * key_tiles + key_tile
    readers_ptr += place * query_tiles
    wanted = key_tile * block_k
    found = 0
    for first in range(0, query_tiles, WIDTH):
        tile = first + tl.arange(0, WIDTH)
        ok = tile < query_tiles
        row = starts_ptr + tile.to(tl.int64) * stride_st
        count = tl.load(counts_ptr + tile, mask=ok, other=0)
        low = tile * 0
        high = count
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            below = tl.load(row + middle, mask=ok & (low < high), other=wanted) < wanted
            low = tl.where(below & (low < high), middle + 1, low)
            high = tl.where(below, high, middle)
        reads = ok & (low < count)
        reads = reads & (tl.load(row + low, mask=reads, other=-1) == wanted)
        if CAUSAL:
            reads = reads & (wanted <= (tile + 1) * block_q - 1 + offset)
        at = found + tl.cumsum(reads.to(tl.int32), 0) - 1
        tl.store(readers_ptr + at, tile, mask=reads)
        found += tl.sum(reads.to(tl.int32), 0)
    tl.store(totals_ptr + place, found)


def readers(lists: Lists, n_q: int, n_k: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Which query tiles read each key tile: ids `(B or 1, H, Tk, Tq)` int32, ascending, and counts `(B or 1, H, Tk)` int32.

    For aligned key tiles. What follows a list's last id is not written. No host synchronisation; memory B * H * Tq * Tk entries.
    """
    batch, heads, query_tiles, most = lists.starts.shape
    key_tiles = ceil_div(n_k, lists.block_k)
    ids = torch.empty(batch, heads, key_tiles, query_tiles, dtype=torch.int32, device=lists.starts.device)
    counts = torch.empty(batch, heads, key_tiles, dtype=torch.int32, device=ids.device)
    turn_kernel[(key_tiles, batch * heads)](
        lists.starts, lists.start_counts, ids, counts, *list_strides(lists)[:5], heads, query_tiles, key_tiles, n_k - n_q,
        lists.block_q, lists.block_k, CAUSAL=causal, STEPS=next_power_of_two(most + 1).bit_length(), WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    return ids, counts
