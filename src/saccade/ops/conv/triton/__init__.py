"""short_conv in Triton: the custom ops, what they refuse, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.conv.triton.launch import WIDEST
from saccade.ops.conv.triton.launch import backward as _backward
from saccade.ops.conv.triton.launch import forward as _forward
from saccade.ops.routes import routed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["refusal", "short_conv"]


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels can't run this call, in a sentence; None if they can."""
    for given in (x, weight, *(() if bias is None else (bias,))):
        if given.dtype not in DTYPES:
            return f'short_conv: Triton kernels take float32, bfloat16 and float16, not {given.dtype}: convert, or use impl "conv1d"'
    if weight.shape[1] > WIDEST:
        return f'short_conv: Triton kernels take widths up to {WIDEST}, not {weight.shape[1]}: use impl "conv1d"'
    return None


_op = torch.library.custom_op("saccade::short_conv", mutates_args=())(_forward)


@_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


def _plain_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool, weights_grad: bool, tail_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dtail); those that are not asked for, or of what is not there, are empty."""
    found = _backward(dy, x, weight, bias, tail, silu, weights_grad, tail_grad)
    dx, dweight, dbias, dtail = (x.new_empty(0) if grad is None else grad for grad in found)
    return dx, dweight, dbias, dtail


_op_backward = torch.library.custom_op("saccade::short_conv_backward", mutates_args=())(_plain_backward)
_run_backward = routed(_op_backward, _plain_backward)


@_op_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool, weights_grad: bool, tail_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape) if weights_grad else x.new_empty(0)
    dbias = bias.new_empty(bias.shape) if weights_grad and bias is not None else x.new_empty(0)
    dtail = x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2])) if tail_grad else x.new_empty(0)
    return x.new_empty(x.shape), dweight, dbias, dtail


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, bias, tail = ctx.saved_tensors
    needs = ctx.needs_input_grad
    found = _run_backward(dy, x, weight, bias, tail, ctx.silu, needs[1] or needs[2], needs[3])
    return (*(grad if need else None for grad, need in zip(found, needs, strict=False)), None)


_op.register_autograd(_gradients, setup_context=_keep)
short_conv = routed(_op, _forward, _keep, _gradients)  # y of `saccade.ops.conv.short_conv`; tail in the dtype of x
