"""scan in Triton: the custom ops, what they refuse, and their gradients.

Forms without delta rule and without gates per channel take their gradients from three more walks (`backward`), the others from two walks
that keep states and from chunks on their own (`adjoint`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.routes import routed
from saccade.ops.scan.problem import Problem
from saccade.ops.scan.triton.adjoint import backward as _adjoint
from saccade.ops.scan.triton.backward import backward as _backward
from saccade.ops.scan.triton.launch import forward as _forward

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 256

__all__ = ["refusal", "scan"]


def refusal(problem: Problem) -> str | None:
    """Why the kernels can't run this problem, in a sentence; None if they can."""
    if problem.q.dtype not in DTYPES:
        return f"scan: Triton kernels take float32, bfloat16 and float16, not {problem.q.dtype}: convert, or use impl \"chunked\""
    d, dv = problem.q.shape[-1], problem.v.shape[-1]
    if max(d, dv - problem.wide_out) > LARGEST:
        return f"scan: Triton kernels take head dims up to {LARGEST}, not {d} and {dv}: use impl \"chunked\""
    return None


def scan(problem: Problem) -> tuple[str, tuple[Tensor, Tensor]]:
    """(what runs, (out, state))."""
    p = problem
    return "triton", _run(p.q, p.k, p.v, p.log_decay, p.beta, p.state, p.cu_seqlens, p.scale, p.wide_out)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, wide_out: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, state) of `scan`; out is float32 with wide_out, else in the dtype of q."""
    state = None if state is None else state.float().contiguous()
    return _forward(q, k, v, log_decay, beta, state, cu_seqlens, scale, torch.float32 if wide_out else q.dtype)


scan_triton = torch.library.custom_op("saccade::scan_triton", mutates_args=())(_plain)


@scan_triton.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, wide_out: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = q.new_empty((q.shape[0], heads, q.shape[2], v.shape[3]), dtype=torch.float32 if wide_out else q.dtype)
    return out, q.new_empty((sequences, heads, q.shape[3], v.shape[3]), dtype=torch.float32)


def _plain_backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, scale: float, gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dlog_decay, dbeta, dstate at the start); dlog_decay is empty unless gate_grad, dbeta without beta."""
    state = None if state is None else state.float()
    dbeta = None
    if beta is None and (log_decay is None or log_decay.ndim != 4):
        dq, dk, dv, dg, first = _backward(dout, dstate, q, k, v, log_decay, state, cu_seqlens, scale, gate_grad)
    else:
        dq, dk, dv, dg, dbeta, first = _adjoint(dout, dstate, q, k, v, log_decay, beta, state, cu_seqlens, scale, gate_grad)
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, q.new_empty(0) if dbeta is None else dbeta, first


scan_triton_backward = torch.library.custom_op("saccade::scan_triton_backward", mutates_args=())(_plain_backward)
_run_backward = routed(scan_triton_backward, _plain_backward)


@scan_triton_backward.register_fake
def _(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, scale: float, gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = log_decay.new_empty(log_decay.shape) if gate_grad and log_decay is not None else q.new_empty(0)
    dbeta = q.new_empty(0) if beta is None else beta.new_empty(beta.shape)
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = q.new_empty((sequences, dout.shape[1], q.shape[3], v.shape[3]), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dg, dbeta, first


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, scale, _wide_out = inputs
    ctx.save_for_backward(*tensors)
    ctx.scale = scale


def _gradients(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Any, ...]:
    q, k, v, log_decay, beta, state, cu_seqlens = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dout is None:
        heads = max(q.shape[1], k.shape[1], v.shape[1])
        dout = q.new_zeros((q.shape[0], heads, q.shape[2], v.shape[3]))
    found = _run_backward(dout, dstate, q, k, v, log_decay, beta, state, cu_seqlens, ctx.scale, needs[3])
    grads = (*found[:5], found[5] if state is None else found[5].to(state.dtype))
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=False)), None, None, None)


scan_triton.register_autograd(_gradients, setup_context=_keep)
_run = routed(scan_triton, _plain, _keep, _gradients)
