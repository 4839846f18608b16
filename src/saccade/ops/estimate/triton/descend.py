"""The whole descent of one query tile in one program: keys are read where they lie, and nothing is sorted.

The row of the result is the program's own store. A node, a range of units, is one number there: twice its begin, plus one where it is as
long as the longest of its row; the others are one unit shorter. A slot of 64 bits has room for two numbers, one for each half. Each round

    takes the nodes to registers, and leaves the place of the first key that scores each half
    scores `KEYS / UNIT` halves at a time by gathered keys, and writes scores over places
    finds the edge that exactly `keep` halves reach, up to ties, bit by bit as in `best`, and leaves the halves that stay as the next nodes

A round of K nodes and m keys a half reads 2 K m D entries of keys and multiplies them with R rows: 4 K m D R operations.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.triton.best import NOTHING, _edge, _order
from saccade.ops.estimate.triton.common import empty, operands, padded_dim
from saccade.ops.gpu import ceil_div, next_power_of_two


@triton.jit
def _half(node, side, longest):
    """Begin and length of the left (side 0) or right half of a node; only the right half of a single unit is empty."""
    length = longest - 1 + (node & 1)
    left = (length + 1) // 2
    return (node >> 1) + tl.where(side > 0, left, 0), tl.where(side > 0, length - left, left)


@triton.jit
def _edge_of_few(key, count):
    """The same as `_edge` in half the steps, of at most 1023 keys: three counts in one sum."""
    edge = tl.full((), -2147483648, tl.int32)
    step = tl.full((), 1073741824, tl.int32)
    for _ in range(16):
        one = edge + step
        two = one + step
        three = two + step
        reached = (key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 10) + ((key >= three).to(tl.int32) << 20)
        reached = tl.sum(reached, axis=0)
        edge = tl.where((reached & 1023) >= count, one, edge)
        edge = tl.where(((reached >> 10) & 1023) >= count, two, edge)
        edge = tl.where((reached >> 20) >= count, three, edge)
        step = step >> 2
    return edge


@triton.jit
def _descend(
    rows, k, sizes, out, row_b, row_h, row_t, row_r, key_b, key_h, key_n, kv_heads, group, tiles, sampled, keep, first, block, stride,
    within, last, DIM: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, HELD: tl.constexpr, KEYS: tl.constexpr,
    UNIT: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # heads of a group side by side, then tiles, the longest first: programs that run together read the keys of one head
    pid = tl.program_id(0)
    tile = tiles - 1 - pid // group % tiles
    pair = pid // group // tiles
    b, h = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    head = h * group + pid % group
    to = out + ((b * kv_heads * group + head) * tiles + tile) * keep
    mine = to.to(tl.pointer_type(tl.int32), bitcast=True)

    n, past = tl.load(sizes + tile), tl.load(sizes + tiles - 1)
    j = tl.arange(0, HELD)
    begin = (j * n) // keep
    length = ((j + 1) * n) // keep - begin
    longest = ((n + keep - 1) // keep).to(tl.int32)
    if n <= keep:
        longest = tl.full((), 1, tl.int32)
        begin = tl.where(j < n, j, past)
        length = tl.full((HELD,), 1, tl.int64)
    node = begin.to(tl.int32) * 2 + (length == longest).to(tl.int32)
    tl.store(mine + 2 * j, node, mask=j < keep)
    tl.debug_barrier()  # each thread reads what others have written, here and below

    d = tl.arange(0, WIDE)
    # rows and keys that fill up repeat the last one, which changes no maximum
    r = tl.minimum(tl.arange(0, ROWS), sampled - 1)
    own = rows + b * row_b + head * row_h + tile.to(tl.int64) * row_t
    if PART == WIDE:
        q = tl.load(own + r[:, None] * row_r + d[None, :], mask=d[None, :] < DIM, other=0.0)
    keys = k + b * key_b + h * key_h
    p = tl.arange(0, KEYS)
    offset = tl.minimum(p % UNIT, within - 1) * stride
    c = tl.arange(0, 2 * HELD)

    while longest > 1:
        whole = tl.load(mine + (c - c % 2), mask=c < 2 * keep, other=0)
        left, size = _half(whole, c % 2, longest)
        middle = left + tl.maximum(size - 1, 0) // 2
        tl.debug_barrier()
        tl.store(mine + c, tl.minimum(middle * block + first, last), mask=c < 2 * keep)
        tl.debug_barrier()
        half = p // UNIT
        place = tl.load(mine + half, mask=half < 2 * keep, other=0)
        for start in tl.range(0, 2 * keep, KEYS // UNIT, num_stages=STAGES):
            at = keys + (place + offset).to(tl.int64)[:, None] * key_n
            # places one product ahead, so that no key waits for its place
            half += KEYS // UNIT
            place = tl.load(mine + half, mask=half < 2 * keep, other=0)
            if PART == WIDE:
                x = tl.load(at + d[None, :], mask=d[None, :] < DIM, other=0.0)
                z = tl.dot(x, tl.trans(q), input_precision="ieee")
            else:
                z = tl.zeros((KEYS, ROWS), tl.float32)
                for column in range(0, WIDE, PART):
                    e = column + tl.arange(0, PART)[None, :]
                    x = tl.load(at + e, mask=e < DIM, other=0.0)
                    y = tl.load(own + r[:, None] * row_r + e, mask=e < DIM, other=0.0)
                    z = tl.dot(x, tl.trans(y), z, input_precision="ieee")
            found = tl.max(tl.reshape(_order(tl.max(z, axis=1)), (KEYS // UNIT, UNIT)), axis=1)
            # every thread has read the places of these halves: the product holds all their keys
            done = start + tl.arange(0, KEYS // UNIT)
            tl.store(mine + done, found, mask=done < 2 * keep)
        tl.debug_barrier()
        score = tl.load(mine + c, mask=c < 2 * keep, other=NOTHING)
        score = tl.where((c < 2 * keep) & (size > 0), score, NOTHING)
        edge = _edge_of_few(score, keep) if HELD <= 256 else _edge(score, keep)
        above, equal = (score > edge).to(tl.int32), (score == edge).to(tl.int32)
        room = keep - tl.sum(above, axis=0)
        # two counts in one sum: neither passes 2 HELD < 2^16
        counts = tl.cumsum(above * 65536 + equal, axis=0)
        taken = counts & 65535
        stays = (above > 0) | ((equal > 0) & (taken <= room))
        slot = (counts >> 16) + tl.minimum(taken, room) - 1
        longest = (longest + 1) // 2
        tl.debug_barrier()
        tl.store(mine + 2 * slot, left * 2 + (size == longest).to(tl.int32), mask=stays)
        tl.debug_barrier()

    chosen = tl.load(mine + 2 * j, mask=j < keep, other=0) >> 1
    tl.debug_barrier()
    tl.store(to + j, chosen.to(tl.int64), mask=j < keep)


@dataclass(frozen=True)
class Config:
    """keys: rows of one product, a power of two from 64 on. stages: of the pipeline that fetches keys, the product itself among them."""

    keys: int = 64
    warps: int = 4
    stages: int = 3


def config(keep: int) -> Config:
    """More threads where the nodes would not lie in the registers of a few."""
    return Config(warps=8 if keep > 1024 else 4)


def launch(rows: Tensor, k: Tensor, sizes: Tensor, keep: int, first: int, block: int, stride: int, config_: Config | None = None) -> Tensor:
    """int64 `(B, Hq, T, keep)`; sizes on the device of k."""
    batch, heads, tiles, sampled, dim = rows.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    out = empty(k, batch, heads, tiles, keep, dtype=torch.int64)
    if not out.numel():
        return out
    chosen = config_ or config(keep)
    within = ceil_div(block, stride)
    rows, k = operands(rows, k)
    wide = padded_dim(dim)
    # float32 is multiplied without the matrix units, from registers: a few channels at a time
    part = min(16, wide) if k.dtype == torch.float32 else wide
    _descend[(batch * heads * tiles,)](
        rows, k, sizes, out, *rows.stride()[:4], *k.stride()[:3], kv_heads, heads // kv_heads, tiles, sampled, keep, first, block, stride,
        within, n_k - block, DIM=dim, WIDE=wide, ROWS=max(16, next_power_of_two(sampled)), HELD=next_power_of_two(keep),
        KEYS=chosen.keys, UNIT=next_power_of_two(within), PART=part, STAGES=chosen.stages, num_warps=chosen.warps,
    )  # fmt: skip
    return out


@torch.library.custom_op("saccade::descend_tree", mutates_args=())
def descend(rows: Tensor, k: Tensor, sizes: Tensor, keep: int, first: int, block: int, stride: int) -> Tensor:
    """int64 `(B, Hq, T, keep)` of rows `(B, Hq, T, R, D)` and k `(B, Hk, n_k, D)`, both with contiguous last axes; keep >= 1."""
    return launch(rows, k, sizes, keep, first, block, stride)


@descend.register_fake
def _(rows: Tensor, k: Tensor, sizes: Tensor, keep: int, first: int, block: int, stride: int) -> Tensor:
    return rows.new_empty((*rows.shape[:3], keep), dtype=torch.int64)
