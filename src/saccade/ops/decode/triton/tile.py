"""What the decode kernels share: which rows a program holds, one step of the running softmax, and how results are stored.

A program holds the queries that read the same keys as the rows of one tile: row r is query `tile * QT + r % QT` of query head
`head * GROUP + r // QT`, where `head` counts the list heads (key/value heads, or query heads where each has lists of its own),
GROUP is the number of query heads for each of them and QT the number of queries in a query tile. Logits are in units of log 2.
"""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

SIMULATED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # the interpreter has no bfloat16 matrix product
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def program(HEADS: tl.constexpr, TILES: tl.constexpr, ROW_BLOCKS: tl.constexpr):
    """(batch row, list head, query tile, row block) of this program; splits are on axis 1."""
    pid = tl.program_id(0)
    block = pid % ROW_BLOCKS
    tile = (pid // ROW_BLOCKS) % TILES
    head = (pid // (ROW_BLOCKS * TILES)) % HEADS
    return pid // (ROW_BLOCKS * TILES * HEADS), head, tile, block


@triton.jit
def rows(head, tile, block, m, GROUP: tl.constexpr, QT: tl.constexpr, BLOCK_M: tl.constexpr):
    """(query head, query, whether the row exists) of each row of the tile."""
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = tile * QT + r % QT
    return head * GROUP + r // QT, query, (r < GROUP * QT) & (query < m)


@triton.jit
def share(total, BLOCK_N: tl.constexpr):
    """[begin, end) of this program's split of `total` keys, whole tiles to each split."""
    tiles = (total + BLOCK_N - 1) // BLOCK_N
    splits = tl.num_programs(1)
    each = ((tiles + splits - 1) // splits) * BLOCK_N
    begin = tl.program_id(1) * each
    return begin, tl.minimum(begin + each, total)


@triton.jit
def capped(logits, cap):
    """`cap * tanh(logits / cap)`: a series near 0, where the quotient of exponentials loses digits."""
    y = logits / cap
    size = tl.abs(y)
    t = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - t) / (1.0 + t)
    s = y * y
    near = 1.0 + s * (-0.3333333333 + s * (0.1333333333 + s * (-0.05396825397 + s * 0.02186948854)))
    return cap * tl.where(size < 0.25, y * near, tl.where(y < 0, -far, far))


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """float32 x in KIND, rounded to nearest: the interpreter cuts digits off for bfloat16, so it is given a number that fits."""
    if SIMULATED and tl.bfloat16 == KIND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(KIND)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a @ b` with float32 sums."""
    if SIMULATED:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        result = tl.dot(a, b, acc, input_precision=PRECISION)
    return result


@triton.jit
def logits_of(products, scale, cap, SOFTCAP: tl.constexpr):
    """Raw products q.k as logits in units of log 2."""
    if SOFTCAP:
        result = capped(products * scale, cap) * LOG2E
    else:
        result = products * (scale * LOG2E)
    return result


@triton.jit
def soften(logits, m, sums):
    """One step of the running softmax: (weights of the tile, factor on what was summed before, new maximum, new sums).

    sums holds one for each column of the tile; they are added up once, at the end.
    """
    top = tl.maximum(m, tl.max(logits, 1))
    # a row that has read no key yet would give -inf - -inf
    shift = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(logits - shift[:, None])
    fade = tl.exp2(m - shift)
    return p, fade, top, sums * fade[:, None] + p


@triton.jit
def step(
    q, k, v, keep, weight, m, sums, acc, scale, cap, SOFTCAP: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Take one tile of keys in: k `(D, N)`, v `(N, Dv)`, keep `(M or 1, N)`, weight `(N,)` added to the logits, in units of log 2."""
    nothing = tl.zeros([q.shape[0], k.shape[1]], tl.float32)
    logits = logits_of(product(q, k, nothing, PRECISION), scale, cap, SOFTCAP)
    if WEIGHTED:
        logits += weight[None, :]
    logits = tl.where(keep, logits, -float("inf"))
    p, fade, m, sums = soften(logits, m, sums)
    acc = product(narrow(p, v.dtype), v, acc * fade[:, None], PRECISION)
    return m, sums, acc


@triton.jit
def normalised(m, sums, acc):
    """(output, log-sum-exp in units of log 2) of a finished tile: 0 and -inf where no key was read."""
    total = tl.sum(sums, 1)
    none = total == 0.0
    lse = tl.where(none, -float("inf"), m + tl.log2(tl.where(none, 1.0, total)))
    return acc / tl.where(none, 1.0, total)[:, None], lse


@triton.jit
def store(
    value, lse, out_ptr, lse_ptr, row, valid, columns, DV: tl.constexpr, PARTIAL: tl.constexpr, WRITE_LSE: tl.constexpr
):  # fmt: skip
    """Store `value (M, columns)` and `lse (M,)` of result rows `row`: the result, or this split's part of it.

    Parts are out `(rows, splits, DV)` float32 and lse `(rows, splits)` in units of log 2.
    """
    row = row.to(tl.int64)
    mask = valid[:, None] & (columns < DV)[None, :]
    if PARTIAL:
        at = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(out_ptr + at[:, None] * DV + columns[None, :], value, mask=mask)
        tl.store(lse_ptr + at, lse, mask=valid)
    else:
        tl.store(out_ptr + row[:, None] * DV + columns[None, :], narrow(value, out_ptr.dtype.element_ty), mask=mask)
        if WRITE_LSE:
            tl.store(lse_ptr + row, lse * LN2, mask=valid)


@triton.jit(do_not_specialize=["splits"])
def combine(
    part_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
    WRITE_LSE: tl.constexpr,
):  # fmt: skip
    """One result row from its splits; an empty split is not read, so what lies there does not matter."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    m = -float("inf")
    total = 0.0
    for begin in range(0, splits, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        e = tl.load(part_lse_ptr + row * splits + s, mask=s < splits, other=-float("inf"))
        x = tl.load(
            part_ptr + (row * splits + s)[:, None] * DV + columns[None, :], other=0.0,
            mask=(e != -float("inf"))[:, None] & (columns < DV)[None, :],
        )  # fmt: skip
        top = tl.maximum(m, tl.max(e, 0))
        shift = tl.where(top == -float("inf"), 0.0, top)
        w = tl.exp2(e - shift)
        fade = tl.exp2(m - shift)
        acc = acc * fade + tl.sum(x * w[:, None], 0)
        total = total * fade + tl.sum(w, 0)
        m = top
    none = total == 0.0
    tl.store(out_ptr + row * DV + columns, narrow(acc / tl.where(none, 1.0, total), out_ptr.dtype.element_ty), mask=columns < DV)
    if WRITE_LSE:
        tl.store(lse_ptr + row, tl.where(none, -float("inf"), (m + tl.log2(tl.where(none, 1.0, total))) * LN2))
