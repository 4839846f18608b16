"""torch FlexAttention as an optional backend, compiled; it is never run uncompiled, which would materialise the dense map."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from saccade.core import Partial
from saccade.ops.attend.problem import Problem


def require(problem: Problem) -> None:
    """ValueError when FlexAttention can't run this call."""
    if problem.q.device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ValueError("impl='flex' compiles C++ on a CPU and found no compiler: install g++, or use impl='cpu'")
    if problem.bias is not None:
        raise ValueError("impl='flex' takes no additive bias here: use impl='cpu' or 'reference'")
    if problem.masked or problem.sinks is not None or problem.low_rank is not None:
        raise ValueError("impl='flex' takes no positions, lengths, sequences, sinks or low-rank bias here: use impl='auto' or 'reference'")
    if problem.selection is not None and problem.selection.log_weight is not None:
        raise ValueError("impl='flex' can't express log weights: use impl='cpu' or 'reference'")
    dims = (problem.q.shape[-1], problem.v.shape[-1])
    if problem.q.device.type == "cpu" and (problem.return_lse or problem.q.requires_grad):
        raise ValueError("impl='flex' on a CPU gives neither a log-sum-exp nor gradients: use impl='cpu' or 'reference'")
    if problem.q.device.type == "cuda" and any(d & (d - 1) or d < 16 for d in dims):
        raise ValueError(f"impl='flex' needs head dims that are powers of two from 16 on, not {dims}")


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def attend(problem: Problem) -> Partial:
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, n_q, n_k = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if problem.selection is not None:
        mask = problem.selection.to_flex(batch, heads)
    elif problem.causal:
        offset = n_k - n_q
        mask = create_block_mask(lambda b, h, row, key: key <= row + offset, 1, 1, n_q, n_k, device=str(q.device))
    else:
        mask = None
    cap = problem.softcap or 0.0

    def capped(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    result = _compiled()(
        q, k, v, score_mod=capped if cap else None, block_mask=mask, scale=problem.scale, enable_gqa=problem.layout.group > 1,
        return_lse=problem.return_lse,
    )  # fmt: skip
    return Partial(*result) if isinstance(result, tuple) else Partial(result, None)
