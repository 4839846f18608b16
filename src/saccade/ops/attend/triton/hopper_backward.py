"""Backward pass on Hopper GPUs: dense attention, and aligned tiles of 128 keys or multiples read by tiles of 128 queries.

Two kernels without atomics, as in the portable pair. Everything else (tails, caps, biases, other tiles and devices) is the portable
kernels'.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.attend.triton.hopper import BLOCK_M, WARPS, cached_together, tiles_of
from saccade.ops.attend.triton.hopper_backward_k import key_major_kernel
from saccade.ops.attend.triton.hopper_backward_q import query_major_kernel
from saccade.ops.attend.triton.launch import Lists, rows_layout
from saccade.ops.gpu import ceil_div, multiprocessors

HALF = 64  # rows of a group of warps, and queries of a step of the key-major kernel
KEYS = 128  # keys of a step of the query-major kernel, and of a program of the other
SLOTS_K, SLOTS_Q = 2, 3  # of the rings of keys and values, of queries and output gradients
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24


def takes(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None) -> bool:
    """Whether these kernels run the problem: its shapes and strides. The device, caps, biases and masks are the caller's to rule out."""
    if q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128):
        return False
    if q.shape[2] % BLOCK_M or k.shape[2] % KEYS:
        return False
    if lists is not None:
        tiles = lists.block_q == BLOCK_M and lists.block_k % KEYS == 0 and lists.aligned and lists.starts.shape[-1] > 0
        if not tiles or k.shape[2] % lists.block_k or lists.tokens.shape[-1] > 0 or lists.log_weight is not None:
            return False
    return all(rows_layout(x, x.shape[-1]) is not None for x in (q, k, v))


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse2: Tensor, delta: Tensor, lists: Lists | None, strides: tuple[int, ...],
    readers: tuple[Tensor, Tensor] | None, *, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv). lse2, delta `(B, Hq, N)` float32: see `launch_backward`. strides: those of the lists; readers: turned lists."""
    batch, heads, n_q, dim = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    list_heads = 1 if lists is None else max(lists.starts.shape[1], lists.tokens.shape[1])
    tiles = ceil_div(n_q, BLOCK_M)
    work = tiles * batch * heads
    together = group * cached_together(batch * kv_heads, n_k * dim * 2 * k.element_size())
    halves = [tiles_of(x, HALF) for x in (q, d_out, k, v)]
    steps = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shared = {"D": dim, "CAUSAL": causal, "LISTED": lists is not None, "MORE": CONSUMER_REGISTERS, "FEW": PRODUCER_REGISTERS}
    query_major_kernel[(min(multiprocessors(q), work),)](
        *halves[:2], tiles_of(k, KEYS), tiles_of(v, KEYS), dq, lse2, delta,
        q if lists is None else lists.starts, q if lists is None else lists.start_counts, scale, n_q, n_k, *steps, *strides[:5],
        heads, group, heads // list_heads, tiles, together, work,
        STAGES=SLOTS_K, INNER=1 if lists is None else lists.block_k // KEYS, num_warps=WARPS, **shared,
    )  # fmt: skip
    ids, counts = (q, q) if readers is None else readers
    key_major_kernel[(ceil_div(n_k, KEYS), batch * kv_heads)](
        *halves[2:], *halves[:2], dk, dv, lse2, delta, ids, counts, scale, n_q, n_k, *steps, heads, group, heads // list_heads,
        1 if readers is None else ids.shape[0], list_heads, 1 if readers is None else ids.shape[2], ids.shape[-1],
        KEYS if lists is None else lists.block_k,
        KEYS=KEYS, STAGES=SLOTS_Q, INNER=BLOCK_M // HALF, num_warps=WARPS, **shared,
    )  # fmt: skip
    return dq, dk, dv
