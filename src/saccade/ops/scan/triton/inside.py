"""What the kernels share: where a segment lies, the gates of a chunk, and the inverse of a unit lower triangular matrix."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.gpu import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
# e ** -256 is 0 in float32: a gate below forgets all the same, and -inf would turn into NaN where gates are subtracted
LOWEST = tl.constexpr(-256.0)
NO_GATE = tl.constexpr(0)
HEAD_GATE = tl.constexpr(1)
TOKEN_GATE = tl.constexpr(2)
CHANNEL_GATE = tl.constexpr(3)
# the interpreter multiplies bfloat16 by its bit patterns; widened first, the products are those of the tensor cores
WIDEN = tl.constexpr(interpreting())


@triton.jit
def matmul(a, b, PRECISION: tl.constexpr):
    """a @ b in float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def matmul_add(a, b, to, PRECISION: tl.constexpr):
    """to + a @ b in float32."""
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), to, input_precision="ieee")
    else:
        return tl.dot(a, b, to, input_precision=PRECISION)


@triton.jit
def segment_of(slot, n, per_sequence, table, LENGTH, CHUNK: tl.constexpr, PACKED: tl.constexpr):
    """(batch, sequence, start, end, start and end of the sequence, index of the sequence's first chunk) of a segment.

    Packed sequences have a table of five columns; an unused slot has start = end.
    """
    if PACKED:
        sequence = tl.load(table + slot * 5)
        start = tl.load(table + slot * 5 + 1)
        end = tl.load(table + slot * 5 + 2)
        first = tl.load(table + slot * 5 + 3)
        last = tl.load(table + slot * 5 + 4)
        batch = sequence * 0
        chunk = first // CHUNK + sequence
    else:
        sequence = slot // per_sequence
        start = (slot % per_sequence) * LENGTH
        end = tl.minimum(start + LENGTH, n)
        first = sequence * 0
        last = sequence * 0 + n
        batch = sequence
        chunk = sequence * tl.cdiv(n, CHUNK)
    return batch, sequence, start, end, first, last, chunk


@triton.jit
def chunk_gates(gate, stride, at, end, CHUNK: tl.constexpr, GATE: tl.constexpr):
    """Sums of gates in a chunk, in powers of two: up to each token, after each token, over all; and the first as high + low.

    Differences of the last pair are exact enough for any gates: float32 alone would lose the small ones behind a large one.
    """
    i = tl.arange(0, CHUNK)
    if GATE == HEAD_GATE:
        g = tl.maximum(tl.load(gate).to(tl.float32), LOWEST) * LOG2E
        count = tl.minimum(end - at, CHUNK)
        up_to = tl.minimum(i + 1, count).to(tl.float32) * g
        after = tl.maximum(count - 1 - i, 0).to(tl.float32) * g
        over_all = count.to(tl.float32) * g
        high = i.to(tl.float32)
        low = high * 0.0 + g
    else:
        raw = tl.load(gate + (at + i) * stride, mask=at + i < end, other=0.0).to(tl.float32)
        g64 = tl.maximum(raw, LOWEST).to(tl.float64) * LOG2E
        run = tl.cumsum(g64, 0)
        total = tl.sum(g64, 0)
        up_to = run.to(tl.float32)
        after = (total - run).to(tl.float32)
        over_all = total.to(tl.float32)
        high = up_to
        low = (run - high.to(tl.float64)).to(tl.float32)
    return up_to, after, over_all, high, low


@triton.jit
def pair_gates(high, low, GATE: tl.constexpr):
    """Entry (i, j): the gates after token j up to token i, in powers of two; only meant for j <= i."""
    if GATE == HEAD_GATE:
        return (high[:, None] - high[None, :]) * low[:, None]
    else:
        return (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])


@triton.jit
def solve_small(system, BLOCKS: tl.constexpr):
    """(I + system)^-1 of BLOCKS strictly lower triangular 16 x 16 matrices `(BLOCKS, 16, 16)`, by forward substitution."""
    i = tl.arange(0, 16)
    column = i[None, :, None]
    identity = (column == i[None, None, :]) & (tl.arange(0, BLOCKS)[:, None, None] >= 0)
    inverse = tl.where(identity, 1.0, 0.0)
    for step in range(1, 16):
        row = tl.sum(tl.where(column == step, system, 0.0), axis=1)
        known = tl.sum(row[:, :, None] * inverse, axis=1)
        inverse = tl.where(column == step, inverse - known[:, None, :], inverse)
    return inverse


@triton.jit
def join_blocks(small, below, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 `(CHUNK, CHUNK)` from the inverses of its diagonal blocks and what lies below the blocks of A.

    With Y = inverse of the diagonal times `below`, Y^(CHUNK / 16) is 0 and the inverse is (I - Y)(I + Y^2) times that of the diagonal:
    substitution inside blocks keeps it stable, as few powers are taken.
    """
    BLOCKS: tl.constexpr = CHUNK // 16
    a = tl.arange(0, BLOCKS)
    same = (a[:, None, None, None] == a[None, None, :, None]) & (tl.arange(0, 16)[None, :, None, None] >= 0)
    wide = tl.where(same, tl.expand_dims(small, 2), 0.0)
    diagonal = tl.reshape(wide, [CHUNK, CHUNK])
    i = tl.arange(0, CHUNK)
    y = matmul(diagonal, below, PRECISION)
    rest = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - y
    if BLOCKS > 2:
        square = matmul(y, y, PRECISION)
        rest = rest + matmul(rest, square, PRECISION)
    return matmul(rest, diagonal, PRECISION)


@triton.jit
def diagonal_blocks(matrix, CHUNK: tl.constexpr):
    """The 16 x 16 blocks on the diagonal of a `(CHUNK, CHUNK)` matrix."""
    BLOCKS: tl.constexpr = CHUNK // 16
    a = tl.arange(0, BLOCKS)
    same = a[:, None, None, None] == a[None, None, :, None]
    return tl.sum(tl.where(same, tl.reshape(matrix, [BLOCKS, 16, BLOCKS, 16]), 0.0), axis=2)
