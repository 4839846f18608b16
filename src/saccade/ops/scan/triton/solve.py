"""The delta rule inside a chunk: the UT transform.

What a chunk writes is V' = U - W S with U = T V, W = T (e^P K), T = (I + diag(beta) L)^-1 diag(beta), L the gated products of keys below
the diagonal, which `delta` and `channel` leave in memory. U and W do not depend on the state, so all chunks are prepared at once.

The inverse is put together from blocks: 16 x 16 on the diagonal by forward substitution, two of them to a half of the chunk, two halves
to the chunk. Tiles have at most 32 rows, so products run on mma.sync and programs are small: as one tile of 64 rows the chain of
products filled all registers and then local memory.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.scan.triton.inside import CHANNEL_GATE, HEAD_GATE, LOG2E, LOWEST, NO_GATE, matmul, segment_of


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
def on_diagonal(small, WHICH: tl.constexpr, HALF: tl.constexpr):
    """The blocks `(CHUNK / 16, 16, 16)` of one half on the diagonal of a `(HALF, HALF)` matrix."""
    PER: tl.constexpr = HALF // 16
    a = tl.arange(0, 2 * PER)
    place = a[None, :] == tl.arange(0, PER)[:, None] + WHICH * PER
    own = tl.sum(tl.where(place[:, :, None, None], small[None, :, :, :], 0.0), axis=1)
    b = tl.arange(0, PER)
    same = b[:, None, None, None] == b[None, None, :, None]
    return tl.reshape(tl.where(same, own[:, :, None, :], 0.0), [HALF, HALF])


@triton.jit
def half_inverse(small, below, WHICH: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a half, from the inverses of its diagonal blocks and what lies below them."""
    diagonal = on_diagonal(small, WHICH, HALF)
    if HALF == 16:
        return diagonal
    else:
        return diagonal - matmul(matmul(diagonal, below, PRECISION), diagonal, PRECISION)


@triton.jit
def up_to(gate, at, begin, end, HALF: tl.constexpr, GATE: tl.constexpr):
    """e^(gates) from the chunk's first token `at` up to each of the HALF tokens from `begin`; a gate a head, or the lines of `delta`."""
    i = tl.arange(0, HALF)
    if GATE == HEAD_GATE:
        g = tl.maximum(tl.load(gate).to(tl.float32), LOWEST) * LOG2E
        return tl.exp2((tl.minimum(begin + i + 1, end) - at).to(tl.float32) * g)
    else:
        return tl.load(gate + begin + i, mask=begin + i < end, other=0.0)


@triton.jit
def apply(
    first, second, third, x, x_n, at, end, width, to, to_n, BLOCK: tl.constexpr, COUNT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """to = [[first, 0], [second, third]] @ x over the rows of a chunk; x and to point to a head's tokens."""
    i = tl.arange(0, HALF)
    top = (at + i).to(tl.int64)[:, None]
    low = (at + HALF + i).to(tl.int64)[:, None]
    for block in range(0, COUNT):
        c = (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        top_ok = (top < end) & (c < width)
        low_ok = (low < end) & (c < width)
        x_top = tl.load(x + top * x_n + c, mask=top_ok, other=0.0)
        x_low = tl.load(x + low * x_n + c, mask=low_ok, other=0.0)
        y_low = matmul(second, x_top, PRECISION) + matmul(third, x_low, PRECISION)
        y_top = matmul(first, x_top, PRECISION)
        tl.store(to + top * to_n + c, y_top.to(to.dtype.element_ty), mask=top_ok)
        tl.store(to + low * to_n + c, y_low.to(to.dtype.element_ty), mask=low_ok)


@triton.jit
def transform(
    systems, read, v, beta, gate, u, w, inverses, table, n, per_sequence, heads,
    read_group, read_b, read_h, read_n, val_group, val_b, val_h, val_n, gate_b, gate_h, gate_n, beta_b, beta_h, beta_n,
    d: tl.constexpr, dv: tl.constexpr,
    CHUNK: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, VALUE_BLOCKS: tl.constexpr, GATE: tl.constexpr, PACKED: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """u `(B, H, N, Dv)`, w `(B, H, N, D)` of a chunk from L in systems `(chunks, H, CHUNK, CHUNK)` float32. read: the keys, or the keys
    with their gates where these are per channel (they may lie in w, and are read before it is written). inverses, with KEEP: the lower
    triangle of (I + diag(beta) L)^-1."""
    HALF: tl.constexpr = CHUNK // 2
    BLOCKS: tl.constexpr = CHUNK // 16
    slot = tl.program_id(0)
    h = tl.program_id(1)
    batch, _owner, at, end, first, _last, chunk = segment_of(slot, n, per_sequence, table, CHUNK, CHUNK, PACKED)
    batch = batch.to(tl.int64)
    here = (batch * heads + h) * n
    place = ((chunk + (at - first) // CHUNK).to(tl.int64) * heads + h) * CHUNK * CHUNK
    systems += place
    beta += batch * beta_b + h.to(tl.int64) * beta_h
    a3 = tl.arange(0, BLOCKS)[:, None, None] * 16
    r3 = tl.arange(0, 16)[None, :, None]
    c3 = tl.arange(0, 16)[None, None, :]
    token3 = at + a3 + r3
    b3 = tl.load(beta + token3.to(tl.int64) * beta_n, mask=token3 < end, other=0.0).to(tl.float32)
    near = tl.load(systems + (a3 + r3) * CHUNK + a3 + c3, mask=(r3 > c3) & (at < end), other=0.0) * b3
    small = solve_small(near, BLOCKS)

    i = tl.arange(0, HALF)
    row = i[:, None]
    col = i[None, :]
    b_top = tl.load(beta + (at + i).to(tl.int64) * beta_n, mask=at + i < end, other=0.0).to(tl.float32)
    b_low = tl.load(beta + (at + HALF + i).to(tl.int64) * beta_n, mask=at + HALF + i < end, other=0.0).to(tl.float32)
    apart = (row // 16 > col // 16) & (at < end)
    below = tl.load(systems + row * CHUNK + col, mask=apart, other=0.0) * b_top[:, None]
    x1 = half_inverse(small, below, 0, HALF, SOLVE)
    below = tl.load(systems + (HALF + row) * CHUNK + HALF + col, mask=apart, other=0.0) * b_low[:, None]
    x3 = half_inverse(small, below, 1, HALF, SOLVE)
    across = tl.load(systems + (HALF + row) * CHUNK + col, mask=(row >= 0) & (at < end), other=0.0) * b_low[:, None]
    x2 = -matmul(x3, matmul(across, x1, SOLVE), SOLVE)
    if KEEP:
        inverses += place
        kept = inverses.dtype.element_ty
        tl.store(inverses + row * CHUNK + col, x1.to(kept), mask=(row >= 0) & (at < end))
        tl.store(inverses + (HALF + row) * CHUNK + col, x2.to(kept), mask=(row >= 0) & (at < end))
        tl.store(inverses + (HALF + row) * CHUNK + HALF + col, x3.to(kept), mask=(row >= 0) & (at < end))
    x1 = x1 * b_top[None, :]
    x2 = x2 * b_top[None, :]
    x3 = x3 * b_low[None, :]

    dtype = v.dtype.element_ty
    v += batch * val_b + (h // val_group).to(tl.int64) * val_h
    apply(x1.to(dtype), x2.to(dtype), x3.to(dtype), v, val_n, at, end, dv, u + here * dv, dv, BV, VALUE_BLOCKS, HALF, PRECISION)
    if GATE != NO_GATE and GATE != CHANNEL_GATE:
        gate += batch * gate_b + h.to(tl.int64) * gate_h
        e_top = up_to(gate, at, at, end, HALF, GATE)
        e_low = up_to(gate, at, at + HALF, end, HALF, GATE)
        x1 = x1 * e_top[None, :]
        x2 = x2 * e_top[None, :]
        x3 = x3 * e_low[None, :]
    read += batch * read_b + (h // read_group).to(tl.int64) * read_h
    apply(x1.to(dtype), x2.to(dtype), x3.to(dtype), read, read_n, at, end, d, w + here * d, d, BD, 1, HALF, PRECISION)
