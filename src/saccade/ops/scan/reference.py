"""The recurrence, token by token: the definition of `scan`. Any device, float64-able, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from saccade.ops.scan.problem import Problem
from saccade.ops.scan.step import advance


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out `(B, H, N, Dv)`, state `(S, H, D, Dv)`), both in the dtype of computation."""
    if problem.cu_seqlens is not None:
        return by_sequence(scan, problem)
    p = problem.widened()
    state, outs = p.state, []
    assert state is not None
    for t in range(p.q.shape[2]):
        g = None if p.log_decay is None else p.log_decay[:, :, t]
        beta = None if p.beta is None else p.beta[:, :, t]
        out, state = advance(p.q[:, :, t], p.k[:, :, t], p.v[:, :, t], state, g, beta)
        outs.append(p.scale * out)
    return torch.stack(outs, dim=2), state


def by_sequence(run: Callable[[Problem], tuple[Tensor, Tensor]], problem: Problem) -> tuple[Tensor, Tensor]:
    """Runs every sequence of a packed problem on its own."""
    assert problem.cu_seqlens is not None
    ends = problem.cu_seqlens.tolist()
    outs, states = [], []
    for index, (start, end) in enumerate(pairwise(ends)):
        part = problem.sequence(index, start, end)
        if end == start:
            state = part.widened().state
            assert state is not None
        else:
            out, state = run(part)
            outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=2), torch.cat(states)
