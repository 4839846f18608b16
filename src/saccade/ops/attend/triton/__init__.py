"""Triton kernels for `attend` as a torch operator: any Selection, forward and backward.

`saccade::attend` and `saccade::attend_backward` are opaque to torch.compile, with shapes known from their fake forms; nothing in them
waits for the GPU, so they can be captured in a CUDA graph. Plain calls run what is in them (see `routes`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.features import row_bounds
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.triton.extras import Extras
from saccade.ops.attend.triton.launch import Lists, forward, lists_of
from saccade.ops.attend.triton.launch_backward import backward
from saccade.ops.routes import routed

__all__ = ["attend", "refuses"]


MOST_RANK = 32  # of a bias of low rank


def refuses(problem: Problem) -> str | None:
    """Why the kernels can't run this problem, or None."""
    q, v = problem.q, problem.v
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the dtype is {q.dtype}: float16, bfloat16 and float32 are supported"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the head dims are {q.shape[-1]} and {v.shape[-1]}: 256 is the most"
    if problem.low_rank is not None and problem.low_rank.a.shape[3] > MOST_RANK:
        return f"the low-rank bias has rank {problem.low_rank.a.shape[3]}: {MOST_RANK} is the most"
    weight = None if problem.selection is None else problem.selection.log_weight
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (problem.bias, weight)):
        return "a bias or log weight wants a gradient, which the kernels don't give"
    if problem.bias is not None and problem.wants_grad:
        return "the kernels give no gradients through a problem with a bias"
    return None


def attend(problem: Problem) -> Partial:
    """Attention over `problem`, which `refuses` did not refuse."""
    q, k, v = problem.q, problem.k, problem.v
    lists = None if problem.selection is None else lists_of(problem.selection)
    parts = (None,) * 5 + (1, 1, True) if lists is None else tuple(lists)
    extras = _extras(problem)
    out, lse = _run(
        q, k, v, *parts, problem.bias, *extras, problem.causal and not extras.masks, problem.scale, problem.softcap or 0.0,
        problem.return_lse or problem.wants_grad,
    )  # fmt: skip
    return Partial(out, lse if problem.return_lse else None)


def _extras(problem: Problem) -> Extras:
    lo, hi = row_bounds(problem) or (None, None)
    q_positions, k_positions = (None if x is None else x.to(torch.int32) for x in (problem.q_positions, problem.k_positions))
    low_rank = problem.low_rank or (None, None)
    a, b = (x if x is None or x.dtype == problem.q.dtype else x.float() for x in low_rank)
    if a is not None and b is not None and a.dtype != b.dtype:
        a, b = a.float(), b.float()
    sinks = None if problem.sinks is None else problem.sinks.float()
    return Extras(lo, hi, q_positions, k_positions, sinks, a, b)


def _lists(
    starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None, token_counts: Tensor | None, log_weight: Tensor | None,
    block_q: int, block_k: int, aligned: bool,
) -> Lists | None:  # fmt: skip
    if starts is None or start_counts is None or tokens is None or token_counts is None:
        return None
    return Lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, block_q: int, block_k: int, aligned: bool, bias: Tensor | None,
    lo: Tensor | None, hi: Tensor | None, q_positions: Tensor | None, k_positions: Tensor | None, sinks: Tensor | None,
    a: Tensor | None, b: Tensor | None, causal: bool, scale: float, softcap: float, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward(
        q, k, v, _lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned), bias, causal=causal,
        scale=scale, softcap=softcap, need_lse=need_lse, extras=Extras(lo, hi, q_positions, k_positions, sinks, a, b),
    )  # fmt: skip


_attend = torch.library.custom_op("saccade::attend", mutates_args=())(_plain)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3] if others[-1] else (0,), dtype=torch.float32)


def _plain_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None,
    starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None, token_counts: Tensor | None, log_weight: Tensor | None,
    lo: Tensor | None, hi: Tensor | None, q_positions: Tensor | None, k_positions: Tensor | None, sinks: Tensor | None,
    a: Tensor | None, b: Tensor | None, block_q: int, block_k: int, aligned: bool, causal: bool, scale: float, softcap: float,
    rank_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(
        q, k, v, out, lse, d_out, d_lse, _lists(starts, start_counts, tokens, token_counts, log_weight, block_q, block_k, aligned),
        causal=causal, scale=scale, softcap=softcap, extras=Extras(lo, hi, q_positions, k_positions, sinks, a, b), rank_grad=rank_grad,
    )  # fmt: skip


_attend_backward = torch.library.custom_op("saccade::attend_backward", mutates_args=())(_plain_backward)
_run_backward = routed(_attend_backward, _plain_backward)


@_attend_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sinks, a, rank_grad = others[13], others[14], others[-1]
    rank = () if a is None or not rank_grad else (a.shape[3],)
    d_a, d_b = (q.new_empty((*q.shape[:2], n, *rank) if rank else (0,), dtype=torch.float32) for n in (q.shape[2], k.shape[2]))
    d_sinks = q.new_empty(q.shape[1] if sinks is not None else 0, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks, d_a, d_b


def _save(ctx, inputs, output) -> None:
    q, k, v, *lists = inputs[:8]
    extras = Extras(*inputs[12:19])
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, *lists, *extras)
    ctx.numbers = (*inputs[8:11], *inputs[19:22])


def _gradients(ctx, d_out: Tensor | None, d_lse: Tensor | None):
    q, k, v, out, lse, *others = ctx.saved_tensors
    sinks, a, b = others[-3:]
    rank_grad = any(ctx.needs_input_grad[17:19])
    d_out = torch.zeros_like(out) if d_out is None else d_out
    d_q, d_k, d_v, d_sinks, d_a, d_b = _run_backward(q, k, v, out, lse, d_out, d_lse, *others, *ctx.numbers, rank_grad)
    ranks = (d_a.sum_to_size(a.shape).to(a.dtype), d_b.sum_to_size(b.shape).to(b.dtype)) if rank_grad else (None, None)
    return (d_q, d_k, d_v, *(None,) * 13, None if sinks is None else d_sinks, *ranks, *(None,) * 4)


_attend.register_autograd(_gradients, setup_context=_save)
_run = routed(_attend, _plain, _save, _gradients)
