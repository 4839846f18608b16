"""Ragged batches as plain rectangles: one dense problem for each sequence or batch row, for CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.problem import LowRank, Problem


class Rectangle(NamedTuple):
    """Query rows `rows` of batch row `row` and the dense problem that gives them."""

    row: int
    rows: slice
    problem: Problem


def rectangles(problem: Problem) -> Iterator[Rectangle]:
    """The rectangles of a problem with lengths, starts or sequences and no selection; rows that see nothing are in none.

    Reads the lengths, so on a GPU it would wait for the device.
    """
    n_q, n_k = problem.q.shape[2], problem.k.shape[2]
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        for (q0, q1), (k0, k1) in zip(pairwise(problem.cu_seqlens_q.tolist()), pairwise(problem.cu_seqlens_k.tolist()), strict=True):
            if q1 > q0 and k1 > k0:
                yield _cut(problem, 0, slice(q0, q1), slice(k0, k1), causal=problem.causal)
        return
    batch = problem.q.shape[0]
    begins = [0] * batch if problem.starts is None else problem.starts.clamp(0, n_k).tolist()
    ends = [n_k] * batch if problem.lengths is None else problem.lengths.clamp(0, n_k).tolist()
    by_index = problem.causal and problem.q_positions is None
    for row, (k0, k1) in enumerate(zip(begins, ends, strict=True)):
        if k0 >= k1:
            continue
        if not by_index:
            yield _cut(problem, row, slice(0, n_q), slice(k0, k1), causal=problem.causal)
            continue
        # rows from the first that sees a key to the one that sits on the last key are causal; all later rows see every key
        first, square = (min(max(k - (n_k - n_q), 0), n_q) for k in (k0, k1))
        if square > first:
            yield _cut(problem, row, slice(first, square), slice(k0, k1), causal=True)
        if n_q > square:
            yield _cut(problem, row, slice(square, n_q), slice(k0, k1), causal=False)


def assemble(problem: Problem, parts: Iterator[tuple[Rectangle, Partial]]) -> Partial:
    """The parts in their places; what no part covers is 0 with lse -inf."""
    q = problem.q
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], problem.v.shape[-1])
    lse = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device) if problem.return_lse else None
    for where, part in parts:
        out[where.row, :, where.rows] = part.out[0]
        if lse is not None:
            assert part.lse is not None
            lse[where.row, :, where.rows] = part.lse[0].to(exact)
    return Partial(out, lse)


def _cut(problem: Problem, row: int, rows: slice, keys: slice, *, causal: bool) -> Rectangle:
    def of(x: Tensor, *dims: tuple[int, slice]) -> Tensor:
        """x of this batch row, cut along dims that it has in full."""
        x = x if x.shape[0] == 1 else x[row : row + 1]
        for dim, part in dims:
            if x.shape[dim] > 1:
                x = x.narrow(dim, part.start, part.stop - part.start)
        return x

    q_positions, k_positions, bias, low_rank = problem.q_positions, problem.k_positions, problem.bias, problem.low_rank
    part = replace(
        problem, q=of(problem.q, (2, rows)), k=of(problem.k, (2, keys)), v=of(problem.v, (2, keys)), causal=causal,
        cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, starts=None,
        q_positions=None if q_positions is None else of(q_positions, (2, rows)),
        k_positions=None if k_positions is None else of(k_positions, (2, keys)),
        bias=None if bias is None else of(bias, (2, rows), (3, keys)),
        low_rank=None if low_rank is None else LowRank(of(low_rank.a, (2, rows)), of(low_rank.b, (2, keys))),
    )  # fmt: skip
    return Rectangle(row, rows, part)
