"""Scores of tiles from one vector per block of tokens, and how far that vector can be trusted."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from saccade.core import check_attention_inputs
from saccade.ops.estimate import reference
from saccade.ops.estimate.common import Impl, TileGrid, check_block, check_heads, check_scale, kernel_limits, note, rows_first, use_triton

POOLS = ("mean", "max", "min")
HEADS = ("none", "mean", "max")


class BlockStatistics(NamedTuple):
    """mean: `(B, H, T, D)` of each block's tokens. similarity: `(B, H, T)`, their mean pairwise cosine. float32 (float64)."""

    mean: Tensor
    similarity: Tensor


def pool_blocks(x: Tensor, block: int, pool: Literal["mean", "max", "min"] = "mean", *, impl: Impl = "auto") -> Tensor:
    """One vector per run of `block` tokens, channel by channel: `(B, H, N, D)` to `(B, H, ceil(N / block), D)`.

    Means are float32 (float64 for float64) over the tokens that the last run has; maxima and minima keep the dtype of x.
    """
    check_heads("pool_blocks", x, "x")
    check_block("pool_blocks", "block", block)
    if pool not in POOLS:
        raise ValueError(f"pool_blocks: pool={pool!r} is not one of {', '.join(POOLS)}")
    fast = use_triton("pool_blocks", impl, x, kernel_limits(x))
    note("pool_blocks", "triton" if fast else "reference", x, x.shape[2], x.shape[2])
    if not fast or not x.numel():
        return reference.pool(x, block, pool)
    from saccade.ops.estimate.triton import pool as kernels

    return kernels.pool(rows_first(x), None, block, pool == "mean", pool == "max", pool == "min", False)[POOLS.index(pool)]


def block_statistics(x: Tensor, block: int, *, shift: Tensor | None = None, impl: Impl = "auto") -> BlockStatistics:
    """Mean and self-similarity of each run of `block` tokens of x `(B, H, N, D)`, in one pass.

    similarity = mean over all pairs (a, b) of cosine(x_a, x_b), a = b included, which is `|sum_a x_a / |x_a||^2 / n^2`: 1 where all
    tokens point one way. A token of length 0 is like no other. shift: `(B, H, D)`, taken from every token first (the mean key).

    Source: spargeattn, arXiv 2502.18137, section 3.2 (blocks with a low value are always computed).
    """
    check_heads("block_statistics", x, "x")
    check_block("block_statistics", "block", block)
    if shift is not None and shift.shape != (x.shape[0], x.shape[1], x.shape[3]):
        raise ValueError(f"block_statistics: shift {tuple(shift.shape)} does not fit x {tuple(x.shape)}: expected (B, H, D)")
    fast = use_triton("block_statistics", impl, x, kernel_limits(x))
    note("block_statistics", "triton" if fast else "reference", x, x.shape[2], x.shape[2])
    if not fast or not x.numel():
        return BlockStatistics(*reference.statistics(x, block, shift))
    from saccade.ops.estimate.triton import pool as kernels

    shift = None if shift is None else shift.contiguous()
    mean, _, _, similarity = kernels.pool(rows_first(x), shift, block, True, False, False, True)
    return BlockStatistics(mean, similarity)


def self_similarity(x: Tensor, block: int, *, shift: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """The similarity of `block_statistics` alone, `(B, H, T)`."""
    return block_statistics(x, block, shift=shift, impl=impl).similarity


def pooled_scores(
    q: Tensor, k: Tensor, block_q: int, block_k: int, *, causal: bool = True, scale: float | None = None,
    pool: Literal["mean", "max"] = "mean", heads: Literal["none", "mean", "max"] = "none", impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Logits of pooled queries and keys: `scale * pool(q tile) . pool(k tile)`, float32 (float64) `(B, H, Tq, Tk)`.

    q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`; tiles without a visible pair hold -inf. scale: default `D ** -0.5`.
    heads: "none" gives H = Hq, "mean" and "max" reduce over the query heads that share a key/value head, H = Hk.

    Sources: minference, arXiv 2407.02490, algorithm 3 (means); spargeattn, arXiv 2502.18137, section 3.2.
    """
    check_attention_inputs(q, k, k)
    check_block("pooled_scores", "block_q", block_q)
    check_block("pooled_scores", "block_k", block_k)
    if pool not in ("mean", "max"):
        raise ValueError(f"pooled_scores: pool={pool!r} is not one of mean, max")
    if heads not in HEADS:
        raise ValueError(f"pooled_scores: heads={heads!r} is not one of {', '.join(HEADS)}")
    grid = TileGrid.of(q, k, block_q, block_k, causal)
    scale = check_scale("pooled_scores", scale, q.shape[-1])
    a, b = pool_blocks(q, block_q, pool, impl=impl), pool_blocks(k, block_k, pool, impl=impl)
    scores = reference.products(a * scale, b)
    if heads != "none":
        by_group = scores.unflatten(1, (k.shape[1], -1))
        scores = by_group.mean(2) if heads == "mean" else by_group.amax(2)
    note("pooled_scores", "triton" if use_triton("pooled_scores", impl, q, kernel_limits(q)) else "reference", q, grid.n_q, grid.n_k)
    return scores.masked_fill_(~grid.visible(q.device), -torch.inf) if causal else scores
