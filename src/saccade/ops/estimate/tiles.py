"""Reductions of the score map over tiles, without the map: tile maxima, in full precision or few bits, and sums of probabilities."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saccade.core import check_attention_inputs
from saccade.ops.estimate import cpu, reference
from saccade.ops.estimate.common import (
    Impl,
    TileGrid,
    check_block,
    check_scale,
    check_softcap,
    exact,
    in_torch,
    is_power_of_two,
    kernel_limits,
    note,
    rows_first,
    use_triton,
)


def tile_maxima(
    q: Tensor, k: Tensor, block_q: int, block_k: int, *, bits: Literal[4, 8] | None = None, smooth: bool = True, group: int = 1,
    relative_to: Tensor | None = None, reach: Tensor | None = None, causal: bool = True, scale: float | None = None,
    softcap: float | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """The largest logit of each tile, over its visible pairs: float32 (float64) `(B, Hq, Tq, Tk)`, natural-log units, -inf without one.

    q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`. relative_to: `(B, Hq, Nq)`, taken from every logit of its row first: with the log-sum-exp of a
    row over some keys the result is the log of the largest weight relative to those keys.
    bits: products of integers in [-7, 7] (4) or [-127, 127] (8), one step `max |x| / most` for `group` tokens; None: exact products.
    smooth: round q - qbar and k - kbar (means over all tokens) instead, and add `qbar.(k_j - kbar)` and `q_i.kbar`, so that the result
    estimates the same logits.
    reach: int64 `(Tq,)` on the device of q, how many first keys each query tile asks about: multiples of block_k, and with causal none
    beyond the position of the tile's first row (not checked). Tiles from there on hold -inf.

    Source: sale, arXiv 2505.24179, sections 3.1 and 3.2: a tile of 64 queries and 32 keys is read when its value with bits=4, relative to
    the log-sum-exp over sink and local keys, is above log(tau).
    """
    _check(q, k, block_q, block_k, "tile_maxima")
    if bits not in (None, 4, 8):
        raise ValueError(f"tile_maxima: bits={bits!r} is not 4, 8 or None")
    check_block("tile_maxima", "group", group)
    if relative_to is not None and relative_to.shape != q.shape[:3]:
        raise ValueError(f"tile_maxima: relative_to {tuple(relative_to.shape)} does not fit q {tuple(q.shape)}: expected (B, Hq, Nq)")
    grid = TileGrid.of(q, k, block_q, block_k, causal)
    if reach is not None and (reach.shape != (grid.rows,) or reach.device != q.device):
        raise ValueError(f"tile_maxima: reach is {tuple(reach.shape)} on {reach.device}: expected ({grid.rows},) on {q.device}")
    scale, cap = check_scale("tile_maxima", scale, q.shape[-1]), check_softcap("tile_maxima", softcap)
    unsupported = _unsupported(q, block_q, block_k)
    if bits is not None and unsupported is None and (not is_power_of_two(group) or group > 64):
        unsupported = f"the kernel shares a step among 1, 2, 4 ... 64 tokens, not {group}"
    fast, plain = use_triton("tile_maxima", impl, q, unsupported), in_torch(impl, q)
    note("tile_maxima", "triton" if fast else plain, q, grid.n_q, grid.n_k)
    if not fast or not q.numel() or not k.numel():
        find = partial(cpu.tile_maxima, reach=reach) if plain == "cpu" else partial(reference.tile_reduce, total=False)
        found = find(
            q, k, grid, offset=grid.offset, scale=scale, softcap=cap, relative_to=relative_to, bits=bits, group=group, smooth=smooth
        )
        return _within(found, block_k, reach)
    from saccade.ops.estimate.triton import maxima, quantise, tiles

    relative_to = None if relative_to is None else relative_to.float().contiguous()
    codes = quantise.Codes(rows_first(q), rows_first(k), None, None, None, None)
    if bits is None:
        found = tiles.reduce(
            codes.q, codes.k, relative_to, None, None, None, None, block_q, block_k, causal, grid.offset, scale, cap, False
        )
        return _within(found, block_k, reach)
    if maxima.supported(smooth, block_q, block_k, cap):
        codes = quantise.quantise_pair(codes.q, codes.k, bits, group, True, float8=bits == 4 and quantise.multiplies_float8(q))
        assert codes.q_step is not None and codes.k_step is not None and codes.q_add is not None and codes.k_add is not None
        return maxima.maxima(
            codes.q, codes.k, relative_to, codes.q_step, codes.k_step, codes.q_add, codes.k_add, reach, block_q, block_k, bits, group,
            causal, grid.offset, scale,
        )  # fmt: skip
    codes = quantise.quantise_pair(codes.q, codes.k, bits, group, smooth)
    found = tiles.reduce(
        codes.q, codes.k, relative_to, codes.q_step, codes.k_step, codes.q_add, codes.k_add, block_q, block_k, causal, grid.offset,
        scale, cap, False,
    )  # fmt: skip
    return _within(found, block_k, reach)


def _within(found: Tensor, block_k: int, reach: Tensor | None) -> Tensor:
    """-inf for the tiles from each row's reach on."""
    if reach is None:
        return found
    begin = torch.arange(found.shape[-1], device=found.device) * block_k
    return found.masked_fill_(begin >= reach.unsqueeze(-1), -torch.inf)


def pooled_probabilities(
    q: Tensor, k: Tensor, block_q: int, block_k: int, *, reduce: Literal["sum", "max"] = "sum", stride: int = 1, causal: bool = True,
    scale: float | None = None, softcap: float | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Softmax probabilities reduced over each tile: float32 (float64) `(B, Hq, Tq, Tk)`; tiles of a row of tiles sum to its rows.

    Two passes over the keys, the log-sum-exp of each row and then the tiles; the map is never held. reduce: "sum", or "max" for the
    largest probability of the tile. stride: only every stride-th query and key from the first on takes part, causal at their own
    positions; it must divide both blocks.

    Source of the strided maximum: proxyattn, arXiv 2509.24745, section 3.2.
    """
    _check(q, k, block_q, block_k, "pooled_probabilities")
    if reduce not in ("sum", "max"):
        raise ValueError(f"pooled_probabilities: reduce={reduce!r} is not one of sum, max")
    check_block("pooled_probabilities", "stride", stride)
    if block_q % stride or block_k % stride:
        raise ValueError(f"pooled_probabilities: stride {stride} does not divide tiles of {block_q} x {block_k}")
    scale, cap = check_scale("pooled_probabilities", scale, q.shape[-1]), check_softcap("pooled_probabilities", softcap)
    # row a stands at offset + a * stride and sees keys b * stride up to there: b <= offset // stride + a
    offset = (k.shape[2] - q.shape[2]) // stride
    q, k, block_q, block_k = q[:, :, ::stride], k[:, :, ::stride], block_q // stride, block_k // stride
    grid = TileGrid.of(q, k, block_q, block_k, causal)
    fast, plain = use_triton("pooled_probabilities", impl, q, _unsupported(q, block_q, block_k)), in_torch(impl, q)
    note("pooled_probabilities", "triton" if fast else plain, q, grid.n_q, grid.n_k)
    if not fast and plain == "cpu":
        return cpu.pooled_probabilities(q, k, grid, offset=offset, scale=scale, softcap=cap, total=reduce == "sum")
    if not fast or not q.numel() or not k.numel():
        limits = torch.arange(grid.n_q, device=q.device) + offset + 1 if causal else torch.full((grid.n_q,), grid.n_k, device=q.device)
        lse = _finite(reference.row_lse(q, k, limits, scale, cap))
        z = reference.tile_reduce(q, k, grid, offset=offset, scale=scale, softcap=cap, relative_to=lse, total=reduce == "sum")
        return z if reduce == "sum" else z.exp()
    from saccade.ops.estimate.triton import lse as lse_kernels
    from saccade.ops.estimate.triton import tiles

    q, k = rows_first(q), rows_first(k)
    lse = lse_kernels.row_lse(q, k, None, offset, causal, scale, cap)
    z = tiles.reduce(q, k, lse, None, None, None, None, block_q, block_k, causal, offset, scale, cap, reduce == "sum")
    return z if reduce == "sum" else z.exp()


def _finite(lse: Tensor) -> Tensor:
    """A row that sees nothing has no tile to be reduced: any finite number keeps nan away."""
    return lse.masked_fill(lse.isneginf(), 0.0)


def _check(q: Tensor, k: Tensor, block_q: int, block_k: int, op: str) -> None:
    check_attention_inputs(q, k, k)
    check_block(op, "block_q", block_q)
    check_block(op, "block_k", block_k)


def _unsupported(q: Tensor, block_q: int, block_k: int) -> str | None:
    if not is_power_of_two(block_q) or not is_power_of_two(block_k):
        return f"the kernel reduces over tiles of 1, 2, 4, 8 ... tokens, not {block_q} x {block_k}"
    return kernel_limits(q)


def mean_probability(sums: Tensor, n_q: int, block_q: int) -> Tensor:
    """`pooled_probabilities` sums `(B, H, Tq, Tk)` as means over the rows of each tile: every row of tiles sums to 1."""
    if sums.shape[2] != math.ceil(n_q / block_q):
        raise ValueError(f"mean_probability: {sums.shape[2]} rows of tiles do not hold {n_q} queries in tiles of {block_q}")
    return sums / reference.sizes(n_q, block_q, sums.device).to(exact(sums)).unsqueeze(-1)
