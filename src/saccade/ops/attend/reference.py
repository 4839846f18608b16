"""The oracle: attention with a dense mask, in plain torch. Differentiable; float64 in, float64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.problem import Problem


def attend(problem: Problem) -> Partial:
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_groups = layout.to_groups(q.to(exact))
    logits = problem.logits(q_groups @ k.to(exact).unsqueeze(2).mT).flatten(1, 2)
    if problem.bias is not None:
        logits = logits + problem.bias.to(exact)
    weight = _log_weight(problem)
    if weight is not None:
        logits = logits + weight
    mask = _mask(problem)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    # a row without any key is 0 by policy; its logits are all -inf, so the shift must not be
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = (layout.to_groups(weights) @ v.to(exact).unsqueeze(2)).flatten(1, 2)
    return Partial(out.to(q.dtype), lse)


def _mask(problem: Problem) -> Tensor | None:
    batch, heads, n_q, n_k = *problem.q.shape[:3], problem.k.shape[2]
    if problem.selection is not None:
        return problem.selection.expand(batch, heads).dense_mask()
    if not problem.causal:
        return None
    rows = torch.arange(n_q, device=problem.q.device) + n_k - n_q
    return torch.arange(n_k, device=problem.q.device) <= rows[:, None]


def _log_weight(problem: Problem) -> Tensor | None:
    """Per-pair log weights `(B, Hq, Nq, Nk)` of the selection's single keys."""
    if problem.selection is None or problem.selection.log_weight is None:
        return None
    s = problem.selection.expand(problem.q.shape[0], problem.q.shape[1])
    assert s.log_weight is not None
    spread = torch.zeros(*s.tokens.shape[:-1], s.n_k + 1, device=s.device)
    spread = spread.scatter(-1, s.tokens.long(), s.log_weight)[..., : s.n_k]
    return spread.repeat_interleave(s.block_q, dim=2)[:, :, : s.n_q]
