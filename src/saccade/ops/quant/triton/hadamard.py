"""The Walsh-Hadamard transform of rows that fit a program."""
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _butterfly(x_ptr, y_ptr, rows, scale, N: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.load(x_ptr + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.reshape(y, [BLOCK, N // 2, 2]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [BLOCK, N])
    tl.store(y_ptr + at, (y * scale).to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None])


def butterfly(x: Tensor) -> Tensor:
    """The transform of x `(..., n)`, n a power of two up to 1024."""
    x = x.contiguous()
    n = x.shape[-1]
    y = torch.empty_like(x)
    rows = x.numel() // n
    block = max(1, 2048 // n)
    if rows:
        _butterfly[(-(-rows // block),)](x, y, rows, n**-0.5, N=n, ROUNDS=n.bit_length() - 1, BLOCK=block, num_warps=4)
    return y
