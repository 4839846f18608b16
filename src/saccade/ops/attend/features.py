"""Positions, ragged batches, sinks and low-rank biases: what is refused, and the small tensors that all implementations share."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.problem import Problem


class Bounds(NamedTuple):
    """Query row i of a batch row sees keys lo_i ... hi_i - 1 at most: int32 `(B or 1, Nq)` each, never falling along Nq."""

    lo: Tensor
    hi: Tensor


def check(problem: Problem) -> None:
    """ValueError or TypeError where an argument does not fit the others."""
    q, k = problem.q, problem.k
    batch, heads, n_q, _ = q.shape
    kv_heads, n_k = k.shape[1], k.shape[2]
    if problem.softcap is not None and problem.softcap <= 0:
        raise ValueError(f"softcap {problem.softcap} must be positive, or None for no cap")
    if problem.bias is not None:
        full = (batch, heads, n_q, n_k)
        shape = problem.bias.shape
        if len(shape) != 4 or not all(_one_of(a, 1, b) for a, b in zip(shape, full, strict=True)):
            raise ValueError(f"bias has shape {tuple(shape)}: expected 4 dimensions broadcastable to {full}")
    for name, x, n in (("q_positions", problem.q_positions, n_q), ("k_positions", problem.k_positions, n_k)):
        if x is None:
            continue
        if not problem.causal:
            raise ValueError(f"{name} says who sees whom with causal=True and would be ignored with causal=False: leave one out")
        _whole_numbers(name, x, q)
        if x.ndim != 3 or not _one_of(x.shape[0], 1, batch) or not _one_of(x.shape[1], 1, kv_heads, heads) or x.shape[2] != n:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (1 or {batch}, 1, {kv_heads} or {heads}, {n})")
    for name, x in (("lengths", problem.lengths), ("starts", problem.starts)):
        if x is not None:
            _whole_numbers(name, x, q)
            if x.shape != (batch,):
                raise ValueError(f"{name} has shape {tuple(x.shape)}: expected ({batch},), one number for each batch row")
    _check_sequences(problem)
    if problem.sinks is not None:
        _floats("sinks", problem.sinks, q)
        if problem.sinks.shape != (heads,):
            raise ValueError(f"sinks have shape {tuple(problem.sinks.shape)}: expected ({heads},), one logit for each query head")
    if problem.low_rank is not None:
        a, b = problem.low_rank
        for name, x, n in (("a", a, n_q), ("b", b, n_k)):
            _floats(f"{name} of low_rank_bias", x, q)
            if x.ndim != 4 or not _one_of(x.shape[0], 1, batch) or not _one_of(x.shape[1], 1, heads) or x.shape[2] != n:
                raise ValueError(f"{name} of low_rank_bias has shape {tuple(x.shape)}: expected (1 or {batch}, 1 or {heads}, {n}, R)")
        if a.shape[3] != b.shape[3] or a.shape[3] == 0:
            raise ValueError(f"low_rank_bias has ranks {a.shape[3]} and {b.shape[3]}: expected one rank, at least 1")


def _one_of(size: int, *allowed: int) -> bool:
    """`size in allowed`, which torch.compile answers wrongly where sizes are symbols."""
    return any(size == x for x in allowed)


def check_state(problem: Problem, state: Partial) -> None:
    """ValueError where a result to go on from is not one of these queries."""
    rows, dim_v = problem.q.shape[:3], problem.v.shape[3]
    if state.lse is None:
        raise ValueError("state has no log-sum-exp: compute it with return_lse=True")
    if tuple(state.out.shape) != (*rows, dim_v) or state.lse.shape != rows:
        raise ValueError(
            f"state has out {tuple(state.out.shape)} and lse {tuple(state.lse.shape)}: expected {(*rows, dim_v)} and {tuple(rows)}"
        )


def _check_sequences(problem: Problem) -> None:
    ends = (problem.cu_seqlens_q, problem.cu_seqlens_k)
    if ends[0] is None and ends[1] is None:
        return
    if ends[0] is None or ends[1] is None:
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: give both")
    if problem.q.shape[0] != 1 or problem.lengths is not None or problem.starts is not None:
        raise ValueError(
            f"cu_seqlens take batch 1 with neither lengths nor starts, not batch {problem.q.shape[0]}: they say where each sequence lies"
        )
    for name, x, n in (("cu_seqlens_q", ends[0], problem.q.shape[2]), ("cu_seqlens_k", ends[1], problem.k.shape[2])):
        _whole_numbers(name, x, problem.q)
        if x.ndim != 1 or len(x) < 2 or x.shape != ends[0].shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (sequences + 1,), the same for queries and keys")
        # the values of a tensor on a GPU are not read: that would wait for it
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            values = x.tolist()
            if values[0] != 0 or values[-1] > n or any(b < a for a, b in pairwise(values)):
                raise ValueError(f"{name} is {values[:4]} ... {values[-1]}: expected row numbers that rise from 0 to at most {n}")


def _whole_numbers(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype if isinstance(x, Tensor) else type(x).__name__}: expected an int32 or int64 tensor")
    _same_device(name, x, q)


def _floats(name: str, x: Tensor, q: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype if isinstance(x, Tensor) else type(x).__name__}: expected a floating-point tensor")
    _same_device(name, x, q)


def _same_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} and q on {q.device}: move it there")


def row_positions(n: int, begin: int, device: torch.device) -> Tensor:
    """Positions `(1, 1, n)` that count up from `begin`."""
    return torch.arange(begin, begin + n, device=device).view(1, 1, n)


def by_query_head(positions: Tensor, heads: int) -> Tensor:
    """`(B, Hq, N)` from positions with 1, Hk or Hq heads."""
    return positions if positions.shape[1] == heads else positions.repeat_interleave(heads // positions.shape[1], dim=1)


def row_bounds(problem: Problem) -> Bounds | None:
    """The keys that lengths, starts or sequences leave to each query row, causality included unless positions decide it; else None.

    No host synchronisation.
    """
    if not problem.ragged:
        return None
    n_q, n_k, device = problem.q.shape[2], problem.k.shape[2], problem.q.device
    rows = torch.arange(n_q, device=device)
    by_index = problem.causal and problem.q_positions is None
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        q_ends, k_ends = problem.cu_seqlens_q.long(), problem.cu_seqlens_k.long()
        after = torch.searchsorted(q_ends[1:], rows, right=True)  # rows past the last sequence are of none
        padding = after == len(q_ends) - 1
        sequence = after.clamp(max=len(q_ends) - 2)
        lo, hi = k_ends[sequence], k_ends[sequence + 1]
        if by_index:
            hi = torch.minimum(hi, torch.maximum(lo, rows + 1 + hi - q_ends[sequence + 1]))
        lo, hi = (torch.where(padding, k_ends[-1], x).clamp(0, n_k).unsqueeze(0) for x in (lo, hi))
    else:
        full = rows.new_full((problem.q.shape[0], 1), n_k)
        lo = torch.zeros_like(full) if problem.starts is None else problem.starts.long().unsqueeze(1)
        hi = full if problem.lengths is None else problem.lengths.long().unsqueeze(1)
        lo, hi = (x.clamp(0, n_k).expand(-1, n_q) for x in (lo, hi))
        if by_index:
            hi = torch.minimum(hi, (rows + 1 + n_k - n_q).clamp(min=0))
    return Bounds(lo.to(torch.int32).contiguous(), hi.to(torch.int32).contiguous())


def counted_only(problem: Problem, x: Tensor) -> Tensor:
    """x `(B, Hk, Nk, D)` with zeros in the rows that count for no query: padding may hold anything, and 0 times a nan is nan."""
    if not problem.ragged:
        return x
    keys = torch.arange(problem.k.shape[2], device=x.device)
    if problem.cu_seqlens_k is not None:
        counts = (keys < problem.cu_seqlens_k[-1]).unsqueeze(0)
    else:
        counts = keys.new_ones(problem.q.shape[0], 1, dtype=torch.bool)
        if problem.lengths is not None:
            counts = counts & (keys < problem.lengths.unsqueeze(1))
        if problem.starts is not None:
            counts = counts & (keys >= problem.starts.unsqueeze(1))
    return x.masked_fill(~counts[:, None, :, None], 0.0)


def join_sinks(part: Partial, sinks: Tensor) -> Partial:
    """`part`, whose lse is there, as if a key with logit `sinks (Hq,)` and value 0 had been read by every row."""
    assert part.lse is not None
    lse = torch.logaddexp(part.lse, sinks.to(part.lse.dtype)[:, None])
    # a row without any key stays 0, also where the sink is -inf
    share = torch.where(part.lse == -torch.inf, 0.0, (part.lse - lse.masked_fill(lse == -torch.inf, 0.0)).exp())
    return Partial((part.out * share.unsqueeze(-1)).to(part.out.dtype), lse)
