"""One query per head times rows of packed codes: a row's bytes are read once for the query heads of its group.

A few channels a row are far too little work for the matrix units: codes are taken out of a word one by one, for a block of tokens at a
time, and each is multiplied with its channel of all queries of the group, in float32. Step and lowest value come in at the end.
"""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.estimate.groups import rows_of
from saccade.ops.estimate.triton.common import empty
from saccade.ops.estimate.triton.products import over_group
from saccade.ops.gpu import ceil_div, next_power_of_two

SUMS = 4096  # of a program: tokens of its block times query heads
LEAST, MOST = 128, 1024  # tokens of a block
WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}


# the heads of a growing cache seldom begin at round places: the kernel is not compiled for those apart
@triton.jit(do_not_specialize_on_alignment=["c_b", "c_h", "r_b", "r_h", "n"])
def _packed(
    q, words, ranges, out, q_b, q_h, q_e, c_b, c_h, r_b, r_h, kv_heads, group, n, DIM: tl.constexpr, C_N: tl.constexpr, R_N: tl.constexpr,
    R_E: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    REDUCE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(1).to(tl.int64)
    b, h = pid // kv_heads, pid % kv_heads
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    j, g = tl.arange(0, BLOCK_N), tl.arange(0, PADDED)
    here, there = j < n - first, g < group
    # rows past the group repeat its last head
    own = q + b * q_b + (h * group + tl.minimum(g, group - 1)) * q_h
    stored = words + b * c_b + h * c_h + first * C_N + j * C_N
    pair = ranges + b * r_b + h * r_h + first * R_N + j * R_N
    sums, total = tl.zeros((PADDED, BLOCK_N), tl.float32), tl.zeros((PADDED,), tl.float32)
    SPAN: tl.constexpr = 16 if WIDTH > 16 else WIDTH
    for w in range(COUNT):
        word = tl.load(stored + w, mask=here, other=0).to(tl.int32)
        for part in tl.static_range(WIDTH // SPAN):
            piece = word >> (part * SPAN)
            for shift in tl.static_range(0, SPAN, BITS):
                c = (w * WIDTH + part * SPAN + shift) // BITS
                # past the last channel the query is zero, whatever the bits are
                x = tl.load(own + c * q_e, mask=c < DIM, other=0.0).to(tl.float32)
                # a code where it stands, under the exponent of 2^(23 - shift), is that number plus the code
                held = (piece & (((1 << BITS) - 1) << shift)) | ((150 - shift) << 23)
                code = held.to(tl.float32, bitcast=True) - 2.0 ** (23 - shift)
                sums += x[:, None] * code[None, :]
                total += x
    step = tl.load(pair, mask=here, other=0.0).to(tl.float32)
    lowest = tl.load(pair + R_E, mask=here, other=0.0).to(tl.float32)
    scores = sums * step[None, :] + total[:, None] * lowest[None, :]
    if REDUCE == "none":
        to = out + ((b * kv_heads + h) * group + g)[:, None] * n + (first + j)[None, :]
        tl.store(to, scores, mask=there[:, None] & here[None, :])
    else:
        tl.store(out + (b * kv_heads + h) * n + first + j, over_group(scores, there, REDUCE), mask=here)


def _words(codes: Tensor) -> Tensor:
    """The bytes of each row in the longest words that they fill and at whose multiples they lie."""
    codes = codes if codes.stride(-1) == 1 else codes.contiguous()
    places = (codes.shape[-1], codes.data_ptr(), *codes.stride()[:-1])
    return codes.view(next(dtype for size, dtype in WORDS.items() if all(place % size == 0 for place in places)))


def launch(q: Tensor, codes: Tensor, ranges: Tensor, bits: int, reduce: str = "none", block: int | None = None) -> Tensor:
    """block: tokens of a program, a power of two."""
    words = _words(codes)
    batch, kv_heads, n, count = words.shape
    group = q.shape[1] // kv_heads
    out = empty(q, batch, rows_of(q.shape[1], kv_heads, reduce), n)
    padded = next_power_of_two(group)
    block = block or min(MOST, max(LEAST, SUMS // padded))
    _packed[(ceil_div(n, block), batch * kv_heads)](
        q, words, ranges, out, *q.stride(), *words.stride()[:2], *ranges.stride()[:2], kv_heads, group, n,
        DIM=q.shape[-1], C_N=words.stride(2), R_N=ranges.stride(2), R_E=ranges.stride(3), COUNT=count,
        WIDTH=8 * words.element_size(), BITS=bits, PADDED=padded, BLOCK_N=block, REDUCE=reduce, num_warps=4,
    )  # fmt: skip
    return out


@torch.library.custom_op("saccade::packed_products", mutates_args=())
def packed(q: Tensor, codes: Tensor, ranges: Tensor, bits: int, reduce: str) -> Tensor:
    """float32 `(B, Hq, n)`, or `(B, Hk, n)` with a reduction, of q `(B, Hq, d)`, codes `(B, Hk, n, bytes)` and ranges `(B, Hk, n, 2)`."""
    return launch(q, codes, ranges, bits, reduce)


@packed.register_fake
def _(q: Tensor, codes: Tensor, ranges: Tensor, bits: int, reduce: str) -> Tensor:
    rows = rows_of(q.shape[1], codes.shape[1], reduce)
    return q.new_empty((q.shape[0], rows, codes.shape[2]), dtype=torch.float32)
