"""What the kernels share: products, where a segment lies, and the gates of a chunk."""

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
# a gate a token, of which the weights below lie in memory
TOKEN_LINES = tl.constexpr(4)
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
def chunk_weights(gate, step, at, end, CHUNK: tl.constexpr, GATE: tl.constexpr):
    """e^(gates): up to each token, after each token, over all. TOKEN_LINES: as `delta.products` left them, the second line `step` on."""
    if GATE == TOKEN_LINES:
        i = tl.arange(0, CHUNK)
        into = tl.load(gate + at + i, mask=at + i < end, other=1.0)
        out_of = tl.load(gate + step + at + i, mask=at + i < end, other=1.0)
        over_all = tl.load(gate + tl.maximum(tl.minimum(at + CHUNK, end) - 1, 0))
    else:
        up_to, after, total, _high, _low = chunk_gates(gate, step, at, end, CHUNK, GATE)
        into = tl.exp2(up_to)
        out_of = tl.exp2(after)
        over_all = tl.exp2(total)
    return into, out_of, over_all


@triton.jit
def pair_gates(high, low, GATE: tl.constexpr):
    """Entry (i, j): the gates after token j up to token i, in powers of two; only meant for j <= i."""
    if GATE == HEAD_GATE:
        return (high[:, None] - high[None, :]) * low[:, None]
    else:
        return (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
