"""Which key tiles a program walks, and which of them need a mask: shared by the query-major kernels."""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_list(starts_ptr, counts_ptr, batch, listing, tile, stride_sb, stride_sh, stride_st, stride_cb, stride_ch):
    """Where a query tile's sorted tile starts stand, and how many there are."""
    starts = starts_ptr + batch.to(tl.int64) * stride_sb + listing.to(tl.int64) * stride_sh + tile.to(tl.int64) * stride_st
    return starts, tl.load(counts_ptr + batch * stride_cb + listing * stride_ch + tile)


@triton.jit
def whole_tiles(starts, count, whole_until, EDGE: tl.constexpr):
    """How many of the sorted starts are at most `whole_until`; the search begins EDGE before the end."""
    whole = tl.maximum(count - EDGE, 0)
    last_start = tl.load(starts + whole - 1, mask=whole > 0, other=whole_until)
    while last_start > whole_until:
        whole -= 1
        last_start = tl.load(starts + whole - 1, mask=whole > 0, other=whole_until)
    return whole


@triton.jit
def tiles_below(starts, count, floor):
    """How many of the sorted starts lie below `floor`."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(starts + middle) < floor
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def bounded_tiles(starts, count, block, first_lo, last_lo, first_hi, last_hi, LISTED: tl.constexpr):
    """Tiles of `block` keys for rows that see keys from first_lo ... last_lo to first_hi ... last_hi (one past).

    Returns (begin, left, whole, end): tiles begin ... left - 1 and whole ... end - 1 need a mask, left ... whole - 1 don't.
    """
    if LISTED:
        end = tiles_below(starts, count, last_hi)
        begin = tl.minimum(tiles_below(starts, count, first_lo - block + 1), end)
        left = tl.minimum(tl.maximum(tiles_below(starts, count, last_lo), begin), end)
        whole = tl.minimum(tl.maximum(tiles_below(starts, count, first_hi - block + 1), left), end)
    else:
        end = tl.cdiv(last_hi, block)
        begin = tl.minimum(first_lo // block, end)
        left = tl.minimum(tl.maximum(tl.cdiv(last_lo, block), begin), end)
        whole = tl.minimum(tl.maximum(first_hi // block, left), end)
    return begin, left, whole, end


@triton.jit
def step_begin(starts, i, inner: tl.constexpr, BN: tl.constexpr, LISTED: tl.constexpr):
    """First key of step i, `inner` steps to a tile."""
    if not LISTED:
        return i * BN
    elif inner == 1:
        return tl.load(starts + i)
    else:
        return tl.load(starts + i // inner) + (i % inner) * BN
