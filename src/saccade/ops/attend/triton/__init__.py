"""Triton kernels for `attend` as a torch operator: any Selection, forward and backward.

`saccade::attend` and `saccade::attend_backward` are opaque to torch.compile, with shapes known from their fake forms; nothing in them
waits for the GPU, so they can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.triton.launch import Lists, forward, lists_of
from saccade.ops.attend.triton.launch_backward import backward

__all__ = ["attend", "refuses"]


def refuses(problem: Problem) -> str | None:
    """Why the kernels can't run this problem, or None."""
    q, k, v = problem.q, problem.k, problem.v
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the dtype is {q.dtype}: float16, bfloat16 and float32 are supported"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the head dims are {q.shape[-1]} and {v.shape[-1]}: 256 is the most"
    weight = None if problem.selection is None else problem.selection.log_weight
    if torch.is_grad_enabled():
        if any(x is not None and x.requires_grad for x in (problem.bias, weight)):
            return "a bias or log weight wants a gradient, which the kernels don't give"
        if problem.bias is not None and any(x.requires_grad for x in (q, k, v)):
            return "the kernels give no gradients through a problem with a bias"
    return None


def attend(problem: Problem) -> Partial:
    """Attention over `problem`, which `refuses` did not refuse."""
    q, k, v = problem.q, problem.k, problem.v
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    lists = None if problem.selection is None else lists_of(problem.selection)
    parts = (None,) * 5 + (1, 1, True) if lists is None else tuple(lists)
    out, lse = _attend(
        q, k, v, *parts, problem.bias, problem.causal, problem.scale, problem.softcap or 0.0, problem.return_lse or wants_grad
    )  # fmt: skip
    return Partial(out, lse if problem.return_lse else None)


def _lists(
    starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None, token_counts: Tensor | None, log_weight: Tensor | None,
    block_q: int, block_k: int, aligned: bool,
) -> Lists | None:  # fmt: skip
    if starts is None or start_counts is None or tokens is None or token_counts is None:
        return None
    return Lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned)


@torch.library.custom_op("saccade::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, block_q: int, block_k: int, aligned: bool, bias: Tensor | None,
    causal: bool, scale: float, softcap: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = _lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned)
    return forward(q, k, v, lists, bias, causal=causal, scale=scale, softcap=softcap, need_lse=need_lse)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, block_q: int, block_k: int, aligned: bool, bias: Tensor | None,
    causal: bool, scale: float, softcap: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = q.new_empty(*q.shape[:3], v.shape[3])
    return out, q.new_empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32)


@torch.library.custom_op("saccade::attend_backward", mutates_args=())
def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None, token_counts: Tensor | None, log_weight: Tensor | None,
    block_q: int, block_k: int, aligned: bool, causal: bool, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lists = _lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned)
    return backward(q, k, v, out, lse, d_out, d_lse, lists, causal=causal, scale=scale, softcap=softcap)


@_attend_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None, token_counts: Tensor | None, log_weight: Tensor | None,
    block_q: int, block_k: int, aligned: bool, causal: bool, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, *lists = inputs[:8]
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *lists)
    ctx.numbers = (*inputs[8:11], *inputs[12:15])


def _gradients(ctx, d_out: Tensor, d_lse: Tensor | None):
    q, k, v, out, lse, *lists = ctx.saved_tensors
    grads = _attend_backward(q, k, v, out, lse, d_out, d_lse, *lists, *ctx.numbers)
    return (*grads, *(None,) * 13)


_attend.register_autograd(_gradients, setup_context=_save)
