"""What the kernels share: base-2 exponentials, the logit cap, and launch sizes."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import interpreting, next_power_of_two

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(z, cap):
    """cap * tanh(z / cap), from an exponential that can't overflow."""
    y = z / cap
    t = tl.exp2(tl.abs(y) * (-2.0 * LOG2E))
    tanh = (1.0 - t) / (1.0 + t)
    return tl.where(y < 0, -tanh, tanh) * cap


def padded_dim(dim: int, least: int = 16) -> int:
    """Columns of a tile that holds rows of `dim` entries: a power of two that tl.dot takes."""
    return max(least, next_power_of_two(dim))


def per_head(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token of `(B, H, N, D)`."""
    return x.stride(0), x.stride(1), x.stride(2)


def empty(x: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device)


def rows_in_groups(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(memory, stride, lead, group) of rows `(R, n)`, R at least 1: entry j of row i is entry `lead + i stride + j` of memory, which begins
    at a multiple of 16 bytes; 16 bytes hold a group of entries. A kernel that reads the groups that hold a row leaves no page that the
    row lies on. Copied only where neighbours in a row are none in memory, or storage itself begins between groups.
    """
    size = x.element_size()
    x = x if x.stride(1) == 1 else x.contiguous()
    lead = x.data_ptr() % 16 // size
    if x.storage_offset() < lead:
        x, lead = x.clone(memory_format=torch.contiguous_format), 0
    return x.as_strided((1,), (1,), x.storage_offset() - lead), x.stride(0), lead, 16 // size


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors to be multiplied with tl.dot. The interpreter holds bfloat16 as bits that it can't multiply: there they are float32."""
    if interpreting():
        return tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)
    return tensors
