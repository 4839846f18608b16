"""Attention that every stored entry has received so far, carried along as a side array (h2o, 2306.14048).

    S_j = sum_{i >= j} softmax_j(q_i.k_j / sqrt(D))         over all queries and over the query heads of a group

Queries at the end of a call with several tokens may be guesses that are taken back: they wait until the next call, or until S is read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.core import LayerContext, StoredKV
from saccade.parts.mass_sums import mass_sums
from saccade.parts.recent_queries import GUESSES, recall, remember

MASS = "mass"  # the side array of S


def accumulate(ctx: LayerContext, kv: StoredKV, q: Tensor, sums: Callable[..., Tensor] = mass_sums) -> None:
    """Add the attention of the new queries q `(B, Hq, m, D)` to S; for the `observe` of a policy.

    sums: what computes the sums, with the arguments and the result of `mass_sums`.
    """
    waiting = recall(ctx.state, ctx.seen - q.shape[2])
    queries = q if waiting is None else torch.cat([waiting, q], dim=2)
    _settle(ctx, kv, queries, GUESSES if q.shape[2] > 1 else 0, sums)


def accumulated(ctx: LayerContext, kv: StoredKV) -> Tensor:
    """S of all entries, `(B, heads, n)`, float32 (float64 for float64 keys); every query of the sequence is in it."""
    _settle(ctx, kv, recall(ctx.state, ctx.seen), 0, mass_sums)
    return kv.side[MASS]


def _settle(ctx: LayerContext, kv: StoredKV, queries: Tensor | None, keep: int, sums: Callable[..., Tensor]) -> None:
    """Add the attention of these newest queries to S, all but the last `keep`, which wait."""
    mass = kv.side.get(MASS)
    if mass is None:
        shape = (kv.keys.shape[0], kv.heads, kv.length)
        mass = torch.zeros(shape, dtype=torch.promote_types(kv.keys.dtype, torch.float32), device=kv.keys.device)
    if queries is not None:
        waiting = min(keep, queries.shape[2])
        settled = queries.shape[2] - waiting
        found = sums(queries[:, :, :settled], kv.keys, scale=ctx.scale, softcap=ctx.softcap, valid=kv.valid, behind=waiting)
        # where one latent is stored for all heads: what they received together
        mass = mass + found.unflatten(1, (kv.heads, -1)).sum(2)
        remember(ctx.state, queries[:, :, settled:], ctx.seen, waiting)
    kv.side[MASS] = mass
