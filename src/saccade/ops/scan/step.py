"""One token of the recurrence: what a decoder runs for every token it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu import runs_on
from saccade.ops.scan.problem import Problem, wide

WIDEST = 1024  # channels of a key that one program reads


def advance(q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """(S_t^T q_t, S_t) from S_{t-1}: q, k `(B, H, D)`, v `(B, H, Dv)`, state `(B, H, D, Dv)`, g `(B, H)` or `(B, H, D)`, beta `(B, H)`.

    The gate acts first, then the delta rule's error is taken against what is left.
    """
    if g is not None:
        state = state * (g[..., None, None] if g.ndim == 2 else g[..., None]).exp()
    if beta is not None:
        v = beta[..., None] * (v - (k[..., None, :] @ state).squeeze(-2))
    state = state + k[..., :, None] * v[..., None, :]
    return (q[..., None, :] @ state).squeeze(-2), state


def scan(problem: Problem) -> tuple[Tensor, Tensor]:
    """A problem of one token, as `reference.scan`: (out `(B, H, 1, Dv)`, state); on a GPU in one kernel, where nothing is traced."""
    if runs_on(problem.q) and fits(problem):
        from saccade.ops.scan.triton.token import token

        return token(problem)
    p = problem.widened()
    assert p.state is not None and p.q.shape[2] == 1 and p.cu_seqlens is None
    g = None if p.log_decay is None else p.log_decay[:, :, 0]
    beta = None if p.beta is None else p.beta[:, :, 0]
    out, state = advance(p.q[:, :, 0], p.k[:, :, 0], p.v[:, :, 0], p.state, g, beta)
    assert state.dtype == wide(problem.q.dtype)
    return p.scale * out[:, :, None], state


def fits(problem: Problem) -> bool:
    """Whether the kernel for one token can run the problem: no float64, no gradients, nothing compiled."""
    p = problem
    if p.q.dtype == torch.float64 or torch.compiler.is_compiling() or p.q.shape[3] > WIDEST:
        return False
    given = (p.q, p.k, p.v, p.log_decay, p.beta, p.state)
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given))
