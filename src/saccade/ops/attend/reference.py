"""The oracle: attention with a dense mask, in plain torch. Differentiable; float64 in, float64 throughout."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.features import by_query_head, counted_only
from saccade.ops.attend.problem import Problem


def attend(problem: Problem) -> Partial:
    q, layout = problem.q, problem.layout
    k, v = (counted_only(problem, x) for x in (problem.k, problem.v))
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_groups = layout.to_groups(q.to(exact))
    logits = problem.logits(q_groups @ k.to(exact).unsqueeze(2).mT).flatten(1, 2)
    if problem.bias is not None:
        logits = logits + problem.bias.to(exact)
    if problem.low_rank is not None:
        a, b = (x.to(exact) for x in problem.low_rank)
        logits = logits + a @ b.mT
    weight = _log_weight(problem)
    if weight is not None:
        logits = logits + weight
    mask = _mask(problem)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    if problem.sinks is not None:
        lse = torch.logaddexp(lse, problem.sinks.to(exact)[:, None])
    # a row without any key is 0 by policy; its logits are all -inf, so the shift must not be
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = (layout.to_groups(weights) @ v.to(exact).unsqueeze(2)).flatten(1, 2)
    return Partial(out.to(q.dtype), lse)


def _mask(problem: Problem) -> Tensor | None:
    """Who reads whom, broadcastable to `(B, Hq, Nq, Nk)`: what is listed, causality, and what the ragged batch leaves."""
    parts = [x for x in (_listed(problem), _causal(problem), _counted(problem)) if x is not None]
    if not parts:
        return None
    mask = parts[0]
    for other in parts[1:]:
        mask = mask & other
    return mask


def _listed(problem: Problem) -> Tensor | None:
    if problem.selection is None:
        return None
    listed = problem.selection.expand(problem.q.shape[0], problem.q.shape[1])
    return replace(listed, causal=False).dense_mask()


def _causal(problem: Problem) -> Tensor | None:
    n_q, n_k, device = problem.q.shape[2], problem.k.shape[2], problem.q.device
    if not problem.causal:
        return None
    if problem.q_positions is not None and problem.k_positions is not None:
        rows, keys = (by_query_head(x, problem.q.shape[1]) for x in (problem.q_positions, problem.k_positions))
        return keys.unsqueeze(2) <= rows.unsqueeze(3)
    rows, keys = torch.arange(n_q, device=device), torch.arange(n_k, device=device)
    if problem.cu_seqlens_q is None or problem.cu_seqlens_k is None:
        return keys <= rows[:, None] + n_k - n_q
    from_end_q = _past(problem.cu_seqlens_q, rows)
    from_end_k = _past(problem.cu_seqlens_k, keys)
    return from_end_k >= from_end_q[:, None]


def _past(ends: Tensor, rows: Tensor) -> Tensor:
    """How many rows of its own sequence follow each row."""
    return ends[1:][_sequence(ends, rows).clamp(max=len(ends) - 2)] - 1 - rows


def _sequence(ends: Tensor, rows: Tensor) -> Tensor:
    """The number of the sequence of each row; the number of sequences for rows past the last."""
    return (ends[1:, None] <= rows).sum(0)


def _counted(problem: Problem) -> Tensor | None:
    n_q, n_k, device = problem.q.shape[2], problem.k.shape[2], problem.q.device
    keys = torch.arange(n_k, device=device)
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        of_q = _sequence(problem.cu_seqlens_q, torch.arange(n_q, device=device))
        of_k = _sequence(problem.cu_seqlens_k, keys)
        return (of_q[:, None] == of_k) & (of_k < len(problem.cu_seqlens_k) - 1)
    if problem.lengths is None and problem.starts is None:
        return None
    counted = keys >= (0 if problem.starts is None else problem.starts[:, None, None, None])
    return counted & (keys < (n_k if problem.lengths is None else problem.lengths[:, None, None, None]))


def _log_weight(problem: Problem) -> Tensor | None:
    """Per-pair log weights `(B, Hq, Nq, Nk)` of the selection's single keys."""
    if problem.selection is None or problem.selection.log_weight is None:
        return None
    s = problem.selection.own_lists().expand(problem.q.shape[0], problem.q.shape[1])
    assert s.log_weight is not None
    spread = torch.zeros(*s.tokens.shape[:-1], s.n_k + 1, device=s.device)
    spread = spread.scatter(-1, s.tokens.long(), s.log_weight)[..., : s.n_k]
    return spread.repeat_interleave(s.block_q, dim=2)[:, :, : s.n_q]
