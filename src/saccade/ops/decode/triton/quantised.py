"""Every key of a quantised segment: packed words are read, and their codes multiplied as exact small numbers.

No element is scaled on its own. K: parameters per channel (shared by a group of tokens) go to q, once for each tile of tokens, and
parameters per token (shared by a group of channels) to the products. V: per channel they go to the tile's sums, per token to the
weights p. Codes are taken from their middle, `x = scale * (code - MID) + centre` with `centre = zero + scale * MID`: what is rounded
to the dtype of q, a factor of the scale, then meets small numbers, and the centres, which may be large, meet float32 alone.
The codes of a word belong to PER interleaved sets of channels, and a row of words to RUNS runs, one for each group of channels with
parameters of its own: q and the output are tuples of tiles, entry g * PER + j for code j of run g. Tokens are the rows of all
tiles and queries the columns: a tile of 8 queries is enough then.
"""
# ruff: noqa: RUF005
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from saccade.ops.decode.triton.tile import LN2, logits_of, narrow, product, program, rows, share
from saccade.ops.decode.triton.unpack import numbers


@triton.jit
def _parameters(
    scale_ptr, zero_ptr, pair, start, end, n, group, DIM: tl.constexpr, PER: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
    SCALED: tl.constexpr, ZEROED: tl.constexpr, BY_TOKEN: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(scales, zero points) of the tile of tokens at `start`: of each run, `(N,)`, or of each set of channels, `(words,)`."""
    scales = ()
    zeros = ()
    if not SCALED:
        scales = scales + (tl.zeros([BLOCK_N], tl.float32),)
        zeros = zeros + (tl.zeros([BLOCK_N], tl.float32),)
    elif BY_TOKEN:
        ids = start + tl.arange(0, BLOCK_N)
        at = (pair * n + ids) * RUNS
        for g in tl.static_range(RUNS):
            s = tl.load(scale_ptr + at + g, mask=ids < end, other=0.0)
            z = s
            if ZEROED:
                z = tl.load(zero_ptr + at + g, mask=ids < end, other=0.0)
            scales = scales + (s,)
            zeros = zeros + (z,)
    else:
        at = (pair * ((n + group - 1) // group) + start // group) * DIM
        for j in tl.static_range(PER):
            channel = tl.arange(0, BLOCK) * PER + j
            mask = (channel < DIM) & (start < end)
            s = tl.load(scale_ptr + at + channel, mask=mask, other=0.0)
            z = s
            if ZEROED:
                z = tl.load(zero_ptr + at + channel, mask=mask, other=0.0)
            scales = scales + (s,)
            zeros = zeros + (z,)
    return scales, zeros


@triton.jit
def _centre(scale, zero, ZEROED: tl.constexpr, MID: tl.constexpr):
    """What a code of MID stands for."""
    centre = scale.to(tl.float32) * MID
    if ZEROED:
        centre += zero.to(tl.float32)
    return centre


@triton.jit
def _outliers(index_ptr, delta_ptr, at, there, channel, COUNT: tl.constexpr, KEYS: tl.constexpr, KIND: tl.constexpr):
    """What outliers add at `channel`, for tokens whose outliers begin at `at`: `(N, channels)` for keys, `(channels, N)` for values."""
    if KEYS:
        total = tl.zeros([at.shape[0], channel.shape[0]], tl.float32)
    else:
        total = tl.zeros([channel.shape[0], at.shape[0]], tl.float32)
    for i in tl.static_range(COUNT):
        index = tl.load(index_ptr + at + i, mask=there, other=0).to(tl.int32)
        delta = tl.load(delta_ptr + at + i, mask=there, other=0.0).to(tl.float32)
        if KEYS:
            total += tl.where(index[:, None] == channel[None, :], delta[:, None], 0.0)
        else:
            total += tl.where(index[None, :] == channel[:, None], delta[None, :], 0.0)
    return narrow(total, KIND)


@triton.jit(do_not_specialize=["n"])
def quantised(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length_ptr, k_scale_ptr, k_zero_ptr, k_book_ptr, k_index_ptr, k_delta_ptr,
    v_scale_ptr, v_zero_ptr, v_book_ptr, v_index_ptr, v_delta_ptr, scale, cap, n, m,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_vb, stride_vh, k_group, v_group,
    stride_kn: tl.constexpr, stride_vn: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROW_BLOCKS: tl.constexpr, QT: tl.constexpr,
    K_BITS: tl.constexpr, K_OFFSET: tl.constexpr, K_MID: tl.constexpr, K_SCALED: tl.constexpr, K_ZEROED: tl.constexpr,
    K_BY_TOKEN: tl.constexpr, K_BOOK: tl.constexpr, K_OUTLIERS: tl.constexpr, K_RUNS: tl.constexpr, K_RUN: tl.constexpr,
    K_BLOCK: tl.constexpr, K_ASM: tl.constexpr, K_RAISE: tl.constexpr,
    V_BITS: tl.constexpr, V_OFFSET: tl.constexpr, V_MID: tl.constexpr, V_SCALED: tl.constexpr, V_ZEROED: tl.constexpr,
    V_BY_TOKEN: tl.constexpr, V_BOOK: tl.constexpr, V_OUTLIERS: tl.constexpr, V_RUNS: tl.constexpr, V_RUN: tl.constexpr,
    V_BLOCK: tl.constexpr, V_ASM: tl.constexpr,
    LENGTHS: tl.constexpr, SOFTCAP: tl.constexpr, PARTIAL: tl.constexpr, WRITE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch * HEADS * ROW_BLOCKS, splits). k, v: int16 words `(B, Hk, n, words)`; parameters and outliers contiguous.

    K_RAISE: by how much the numbers of `numbers` are too large, 0 for not at all; values are summed over many tiles, where such a
    constant would cost digits. BY_TOKEN: scale `(B, Hk, n, RUNS)`; else `(B, Hk, ceil(n / group), D)` with groups of whole tiles of
    BLOCK_N tokens, or one group.
    RUNS runs of RUN words each, read as tiles of BLOCK words.
    """
    K_PER: tl.constexpr = 16 // K_BITS
    V_PER: tl.constexpr = 16 // V_BITS
    K_CHANNELS: tl.constexpr = K_SCALED and not K_BY_TOKEN
    V_CHANNELS: tl.constexpr = V_SCALED and not V_BY_TOKEN
    K_CENTRED: tl.constexpr = K_ZEROED or K_MID > 0
    V_CENTRED: tl.constexpr = V_ZEROED or V_MID > 0
    kind: tl.constexpr = q_ptr.dtype.element_ty
    batch, head, tile, block = program(HEADS, 1, ROW_BLOCKS)
    query_head, query, valid = rows(head, tile, block, m, GROUP, QT, BLOCK_M)
    batch = batch.to(tl.int64)
    head = head.to(tl.int64)
    k_words = tl.arange(0, K_BLOCK)
    v_words = tl.arange(0, V_BLOCK)
    inside = tl.arange(0, BLOCK_N)

    length = n
    if LENGTHS:
        length = tl.minimum(tl.load(length_ptr + batch).to(tl.int32), n)
    k_base = k_ptr + batch * stride_kb + head * stride_kh
    v_base = v_ptr + batch * stride_vb + head * stride_vh
    k_book = k_book_ptr
    if K_BOOK == 2:
        k_book += head * (D * (1 << K_BITS))
    v_book = v_book_ptr
    if V_BOOK == 2:
        v_book += head * (DV * (1 << V_BITS))
    pair = batch * HEADS + head
    q_columns = q_ptr + batch * stride_qb + query_head[None, :].to(tl.int64) * stride_qh + query[None, :] * stride_qm

    # q in the order of the codes; its sums over a run meet the zero points of tokens
    q = ()
    q_sums = ()
    for g in tl.static_range(K_RUNS):
        q_sum = tl.zeros([BLOCK_M], tl.float32)
        for j in tl.static_range(K_PER):
            channel = (g * K_RUN + k_words) * K_PER + j
            q_part = tl.load(
                q_columns + channel[:, None], mask=((k_words < K_RUN) & (channel < D))[:, None] & valid[None, :], other=0.0
            )  # fmt: skip
            q = q + (q_part,)
            if not K_CHANNELS:
                q_sum += tl.sum(q_part.to(tl.float32), 0)
        q_sums = q_sums + (q_sum,)
    acc = ()
    shifts = ()
    for _ in tl.static_range(V_RUNS):
        for _ in tl.static_range(V_PER):
            acc = acc + (tl.zeros([V_BLOCK, BLOCK_M], tl.float32),)
        shifts = shifts + (tl.zeros([BLOCK_N, BLOCK_M], tl.float32),)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    begin, end = share(length, BLOCK_N)
    k_scales, k_zeros = _parameters(
        k_scale_ptr, k_zero_ptr, pair, begin, end, n, k_group, D, K_PER, K_RUNS, K_BLOCK, K_SCALED, K_ZEROED, K_BY_TOKEN, BLOCK_N
    )  # fmt: skip
    v_scales, v_zeros = _parameters(
        v_scale_ptr, v_zero_ptr, pair, begin, end, n, v_group, DV, V_PER, V_RUNS, V_BLOCK, V_SCALED, V_ZEROED, V_BY_TOKEN, BLOCK_N
    )  # fmt: skip
    for start in range(begin, end, BLOCK_N):
        # the parameters of the next tile are asked for now: they are needed at once there
        next_k_scales, next_k_zeros = _parameters(
            k_scale_ptr, k_zero_ptr, pair, start + BLOCK_N, end, n, k_group, D, K_PER, K_RUNS, K_BLOCK, K_SCALED, K_ZEROED, K_BY_TOKEN,
            BLOCK_N,
        )  # fmt: skip
        next_v_scales, next_v_zeros = _parameters(
            v_scale_ptr, v_zero_ptr, pair, start + BLOCK_N, end, n, v_group, DV, V_PER, V_RUNS, V_BLOCK, V_SCALED, V_ZEROED, V_BY_TOKEN,
            BLOCK_N,
        )  # fmt: skip
        ids = start + inside
        there = ids < end
        first = batch * 0 + start  # int64
        token = pair * n + first + inside

        factors = q
        base = tl.zeros([BLOCK_M], tl.float32)
        if K_CHANNELS:
            factors = ()
            common = tl.zeros([K_BLOCK, BLOCK_M], tl.float32)
            for j in tl.static_range(K_PER):
                factor = narrow(q[j].to(tl.float32) * k_scales[j].to(tl.float32)[:, None], kind)
                factors = factors + (factor,)
                if K_CENTRED:
                    common += q[j].to(tl.float32) * _centre(k_scales[j], k_zeros[j], K_ZEROED, K_MID)[:, None]
                if K_RAISE > 0:
                    common -= factor.to(tl.float32) * K_RAISE
            base = tl.sum(common, 0)
        products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32) + base[None, :]
        for g in tl.static_range(K_RUNS):
            k_tile = tl.load(
                k_base + first * stride_kn + inside[:, None] * stride_kn + (g * K_RUN + k_words)[None, :],
                mask=there[:, None] & (k_words < K_RUN)[None, :], other=0,
            )  # fmt: skip
            own = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for j in tl.static_range(K_PER):
                k_channel = tl.minimum((g * K_RUN + k_words) * K_PER + j, D - 1)
                key = numbers(k_tile, k_book, k_channel[None, :], j, K_BITS, K_OFFSET, K_BOOK, kind, K_ASM, K_RAISE > 0)
                own = product(key, factors[g * K_PER + j], own, "tf32")
            if K_RAISE > 0 and not K_CHANNELS:
                own -= q_sums[g][None, :] * K_RAISE
            if K_SCALED and K_BY_TOKEN:
                own = own * k_scales[g].to(tl.float32)[:, None]
                if K_CENTRED:
                    own += q_sums[g][None, :] * _centre(k_scales[g], k_zeros[g], K_ZEROED, K_MID)[:, None]
            if K_OUTLIERS > 0:
                for j in tl.static_range(K_PER):
                    k_channel = tl.where(k_words < K_RUN, (g * K_RUN + k_words) * K_PER + j, -1)
                    key = _outliers(k_index_ptr, k_delta_ptr, token * K_OUTLIERS, there, k_channel, K_OUTLIERS, True, kind)
                    own = product(key, q[g * K_PER + j], own, "tf32")
            products += own

        logits = tl.where(there[:, None], logits_of(products, scale, cap, SOFTCAP), -float("inf"))
        peak = tl.maximum(top, tl.max(logits, 0))
        # a query that has read no key yet would give -inf - -inf
        against = tl.where(peak == -float("inf"), 0.0, peak)
        p = tl.exp2(logits - against[None, :])
        fade = tl.exp2(top - against)
        top = peak
        sums = sums * fade[None, :] + p
        plain = narrow(p, kind)

        new_acc = ()
        new_shifts = ()
        for g in tl.static_range(V_RUNS):
            v_tile = tl.load(
                v_base + first * stride_vn + inside[None, :] * stride_vn + (g * V_RUN + v_words)[:, None],
                mask=there[None, :] & (v_words < V_RUN)[:, None], other=0,
            )  # fmt: skip
            weights = plain
            shift = shifts[g]
            if V_SCALED and V_BY_TOKEN:
                weights = narrow(p * v_scales[g].to(tl.float32)[:, None], kind)
                if V_CENTRED:
                    shift = shift * fade[None, :] + p * _centre(v_scales[g], v_zeros[g], V_ZEROED, V_MID)[:, None]
            new_shifts = new_shifts + (shift,)
            mass = fade
            if V_CHANNELS and V_CENTRED:
                mass = tl.sum(p, 0)
            for j in tl.static_range(V_PER):
                v_channel = tl.minimum((g * V_RUN + v_words) * V_PER + j, DV - 1)
                value = numbers(v_tile, v_book, v_channel[:, None], j, V_BITS, V_OFFSET, V_BOOK, kind, V_ASM, False)
                old = acc[g * V_PER + j] * fade[None, :]
                if V_CHANNELS:
                    fresh = product(value, weights, tl.zeros([V_BLOCK, BLOCK_M], tl.float32), "tf32")
                    part = old + fresh * v_scales[j].to(tl.float32)[:, None]
                    if V_CENTRED:
                        part += _centre(v_scales[j], v_zeros[j], V_ZEROED, V_MID)[:, None] * mass[None, :]
                else:
                    part = product(value, weights, old, "tf32")
                if V_OUTLIERS > 0:
                    v_channel = tl.where(v_words < V_RUN, (g * V_RUN + v_words) * V_PER + j, -1)
                    value = _outliers(v_index_ptr, v_delta_ptr, token * V_OUTLIERS, there, v_channel, V_OUTLIERS, False, kind)
                    part = product(value, plain, part, "tf32")
                new_acc = new_acc + (part,)
        acc = new_acc
        shifts = new_shifts
        k_scales = next_k_scales
        k_zeros = next_k_zeros
        v_scales = next_v_scales
        v_zeros = next_v_zeros

    total = tl.sum(sums, 0)
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    lse = tl.where(none, -float("inf"), top + tl.log2(total))
    row = ((batch * (HEADS * GROUP) + query_head) * m + query).to(tl.int64)
    if PARTIAL:
        at_row = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(lse_ptr + at_row, lse, mask=valid)
    else:
        at_row = row
        if WRITE_LSE:
            tl.store(lse_ptr + row, lse * LN2, mask=valid)
    for g in tl.static_range(V_RUNS):
        shift = tl.sum(shifts[g], 0)
        for j in tl.static_range(V_PER):
            channel = (g * V_RUN + v_words) * V_PER + j
            value = (acc[g * V_PER + j] + shift[None, :]) / total[None, :]
            tl.store(
                out_ptr + at_row[None, :] * DV + channel[:, None], narrow(value, out_ptr.dtype.element_ty),
                mask=((v_words < V_RUN) & (channel < DV))[:, None] & valid[None, :],
            )  # fmt: skip
