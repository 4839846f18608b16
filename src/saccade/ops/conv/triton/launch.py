"""Runs the kernels: plain functions from tensors to tensors, without autograd."""

# pyright: reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.conv.triton import kernels
from saccade.ops.gpu import ceil_div, multiprocessors, next_power_of_two

WIDEST = 16  # taps of a channel that registers hold
PROGRAMS = 64  # of a multiprocessor: several rounds of those that it holds at once, so that the last round costs little


class Tiles(NamedTuple):
    """A program has `length` tokens, `step` of them at a time, and `block` channels: one warp with up to 4 channels a thread."""

    length: int
    step: int
    block: int
    chunks: int
    blocks: int


def tiles(x: Tensor, width: int) -> Tiles:
    """Long walks where there are enough of them: what lies around a program's tokens is read twice."""
    batch, n, channels = x.shape
    block = min(128 if width <= 4 else 64 if width <= 8 else 32, next_power_of_two(channels))
    blocks = ceil_div(channels, block)
    length = 256
    while length > 16 and batch * blocks * ceil_div(n, length) < PROGRAMS * multiprocessors(x):
        length //= 2
    length = min(length, max(4, next_power_of_two(n)))
    return Tiles(length, 4, block, ceil_div(n, length), blocks)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> Tensor:
    """y `(B, N, C)` of `short_conv`, in the dtype of x, contiguous."""
    batch, n, channels = x.shape
    x, tail = even(x), None if tail is None else even(tail)
    y = torch.empty(batch, n, channels, dtype=x.dtype, device=x.device)
    if y.numel():
        t = tiles(x, weight.shape[1])
        kernels.forward[(batch * t.chunks * t.blocks,)](
            x, weight.contiguous(), either(bias, x), either(tail, x), y, n, channels, t.blocks, t.chunks, *steps(x), *steps(tail),
            WIDTH=weight.shape[1], LENGTH=t.length, STEP=t.step, BLOCK=t.block, TAIL=tail is not None, BIAS=bias is not None, SILU=silu,
            num_warps=1,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool, weights_grad: bool, tail_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dtail); the weights' only with weights_grad, dtail only with tail_grad."""
    batch, n, channels = x.shape
    width, biased = weight.shape[1], bias is not None
    x, dy, tail = even(x), even(dy), None if tail is None else even(tail)
    t = tiles(x, width)
    dx = torch.empty(batch, n, channels, dtype=x.dtype, device=x.device)
    dtail = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device) if tail_grad else None
    sums = None
    if weights_grad:
        sums = torch.empty(batch, t.chunks, width + biased, channels, dtype=torch.float32, device=x.device)
    if dx.numel():
        kernels.backward[(batch * t.chunks * t.blocks,)](
            x, weight.contiguous(), either(bias, x), either(tail, x), dy, dx, either(dtail, x), either(sums, x), n, channels, t.blocks,
            t.chunks, *steps(x), *steps(tail), *steps(dy),
            WIDTH=width, LENGTH=t.length, STEP=t.step, BLOCK=t.block, TAIL=tail is not None, BIAS=biased, SILU=silu,
            WEIGHTS=weights_grad, TAIL_GRAD=tail_grad, num_warps=1,
        )  # fmt: skip
    elif dtail is not None:
        dtail.zero_()
    if sums is None:
        return dx, None, None, dtail
    # without atomic additions: the same numbers in the same order, every time
    total = sums.sum((0, 1))
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device).copy_(total[:width].mT)
    return dx, dweight, None if bias is None else total[width].to(bias.dtype, copy=True), dtail


def even(x: Tensor) -> Tensor:
    """Kernels step through the channels one by one; the other axes may lie as they like."""
    return x if x.stride(-1) == 1 else x.contiguous()


def either(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read in place of a tensor that is not there."""
    return other if x is None else x


def steps(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
