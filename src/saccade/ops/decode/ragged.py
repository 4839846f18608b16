"""Ragged caches: one rectangle attention per (batch, key/value head) over its own rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.core import HeadLayout, Partial
from saccade.ops.attend.problem import Problem


def by_head(
    rectangle: Callable[[Problem], Partial], q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], kv_heads: int,
    scale: float, softcap: float | None,
) -> Partial:  # fmt: skip
    """q `(B, Hq, m, D)` over k `(total, D)`, v `(total, Dv)`; a head without keys gives 0 and lse -inf."""
    batch, heads, m, dim = q.shape
    group = heads // kv_heads
    layout = HeadLayout(query_heads=group, kv_heads=1, head_dim=dim, value_dim=v.shape[-1])
    out = q.new_zeros(batch, heads, m, v.shape[-1])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((batch, heads, m), -torch.inf, dtype=exact, device=q.device)
    for b in range(batch):
        for h in range(kv_heads):
            rows = slice(offsets[b * kv_heads + h], offsets[b * kv_heads + h + 1])
            mine = slice(h * group, (h + 1) * group)
            part = rectangle(Problem(
                q=q[b : b + 1, mine], k=k[None, None, rows], v=v[None, None, rows], selection=None, causal=False,
                scale=scale, softcap=softcap, bias=None, return_lse=True, layout=layout,
            ))  # fmt: skip
            assert part.lse is not None
            out[b, mine], lse[b, mine] = part.out[0], part.lse[0].to(exact)
    return Partial(out, lse)
