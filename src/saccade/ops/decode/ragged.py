"""Caches whose rows differ in length: one rectangle attention per (batch, key/value head), or per batch row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from saccade.core import HeadLayout, Partial, Selection
from saccade.ops.attend.problem import Problem

Rectangle = Callable[[Problem], Partial]


def by_head(
    rectangle: Rectangle, q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], kv_heads: int,
    scale: float, softcap: float | None, causal: bool = False,
) -> Partial:  # fmt: skip
    """q `(B, Hq, m, D)` over k `(total, D)`, v `(total, Dv)`; a head without keys gives 0 and lse -inf."""
    batch, heads = q.shape[:2]
    group = heads // kv_heads
    layout = HeadLayout(query_heads=group, kv_heads=1, head_dim=q.shape[-1], value_dim=v.shape[-1])
    out, lse = _empty(q, v)
    for b in range(batch):
        for h in range(kv_heads):
            rows = slice(offsets[b * kv_heads + h], offsets[b * kv_heads + h + 1])
            mine = slice(h * group, (h + 1) * group)
            part = rectangle(Problem(
                q=q[b : b + 1, mine], k=k[None, None, rows], v=v[None, None, rows], selection=None, causal=causal,
                scale=scale, softcap=softcap, bias=None, return_lse=True, layout=layout,
            ))  # fmt: skip
            assert part.lse is not None
            out[b, mine], lse[b, mine] = part.out[0], part.lse[0].to(lse.dtype)
    return Partial(out, lse)


def by_row(rectangle: Rectangle, problem: Problem, lengths: Sequence[int], block_table: Tensor | None) -> Partial:
    """`problem` with only the first `lengths[b]` keys of batch row b; with a table its k and v are pages `(P, page, Hk, D)`."""
    out, lse = _empty(problem.q, problem.v)
    for b, length in enumerate(lengths):
        if length == 0:
            continue
        if block_table is None:
            k, v = (x[b : b + 1, :, :length] for x in (problem.k, problem.v))
        else:
            pages = block_table[b, : -(-length // problem.k.shape[1])].long()
            k, v = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (problem.k, problem.v))
        selection = None if problem.selection is None else _first(problem.selection, b, length)
        part = rectangle(replace(problem, q=problem.q[b : b + 1], k=k, v=v, selection=selection, return_lse=True))
        assert part.lse is not None
        out[b], lse[b] = part.out[0], part.lse[0].to(lse.dtype)
    return Partial(out, lse)


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_zeros(*q.shape[:3], v.shape[-1]), torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)


def _first(s: Selection, b: int, n: int) -> Selection:
    """The selection of batch row b over the first n keys."""

    def own(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x[b : b + 1]

    starts, tokens = own(s.starts), own(s.tokens)
    token_counts = own(s.token_counts).minimum((tokens < n).sum(-1, dtype=torch.int32))  # of one list, tiles may read less
    return replace(
        s, n_k=n, starts=starts.clamp(max=n), start_counts=(starts < n).sum(-1, dtype=torch.int32), tokens=tokens.clamp(max=n),
        token_counts=token_counts, log_weight=None if s.log_weight is None else own(s.log_weight),
    )  # fmt: skip
