"""Choosing tiles: counts, masses and thresholds over tile scores become a Selection, without the host ever waiting for the device.

One rule for all: ties go to the lower index; a mass keeps the tile that crosses the target; what is forced is always read; a nan is read,
not lost; invisible tiles are never chosen, whatever their score, and neither are scores of -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saccade.core import Budget, Mass, Selection, Threshold
from saccade.core.tilemath import row_tiles
from saccade.ops.estimate import reference
from saccade.ops.estimate.common import Impl, TileGrid, exact, note, use_triton

WIDEST_ROW = 8192  # key tiles in a row that the kernel holds in one piece


def choose_top_k(
    scores: Tensor, count: int | float | Tensor, grid: TileGrid, *, sinks: int = 0, local: int = 0, forced: Tensor | None = None,
    inside: bool = True, max_tiles: int | None = None, impl: Impl = "auto",
) -> Selection:  # fmt: skip
    """The highest scores of each query tile. scores: `(B, H, Tq, Tk)`, any finite scale.

    count: tiles for each query tile (int), a share of its visible tiles rounded up (float in (0, 1]), or an integer tensor
    broadcastable to `(B, H, Tq)`.
    sinks: the first keys, local: every row's latest keys (its own included), tokens; forced: bool, broadcastable to the scores. Tiles
    that hold them are always read; with `inside` they come out of the count first, otherwise they are added to what the scores choose.
    max_tiles: width of the lists; a row that wants more keeps forced tiles first, then its best. Default: what the arguments can need.

    Returns a Selection over `grid` with H heads. Raises ValueError for shapes, counts and sizes that don't fit.
    """
    _check(scores, grid, "choose_top_k")
    if isinstance(count, Tensor):
        if count.is_floating_point() or count.dtype == torch.bool:
            raise TypeError(f"choose_top_k: counts are {count.dtype}: give whole numbers of tiles")
        limit, most = _limit("choose_top_k", count.to(torch.int32), scores), grid.columns
    elif isinstance(count, float) and 0 < count <= 1:
        limit, most = _limit("choose_top_k", _share_counts(count, grid, scores.device), scores), math.ceil(count * grid.columns) + 1
    elif isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        limit, most = _limit("choose_top_k", torch.full((), count, dtype=torch.int32, device=scores.device), scores), count
    else:
        raise ValueError(f"choose_top_k: count={count!r} is not a number of tiles, a share in (0, 1] or a tensor of counts")
    return _choose("choose_top_k", "count", scores, limit, most, grid, sinks, local, forced, inside, max_tiles, impl)


def choose_top_p(
    weights: Tensor, share: float | Tensor, grid: TileGrid, *, sinks: int = 0, local: int = 0, forced: Tensor | None = None,
    inside: bool = True, max_tiles: int | None = None, impl: Impl = "auto",
) -> Selection:  # fmt: skip
    """The smallest set of tiles with at least `share` of each query tile's weight; the tile that crosses is kept, and one at least.

    weights: `(B, H, Tq, Tk)`, non-negative (softmax of scores, or probabilities). share: in (0, 1], or a tensor broadcastable to
    `(B, H, Tq)`; 1 keeps every visible tile. With `inside` the weight of forced tiles counts towards the share. Sums are float64.
    The other arguments are those of `choose_top_k`.
    """
    _check(weights, grid, "choose_top_p")
    if not isinstance(share, Tensor):
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"choose_top_p: share={share!r} is not above 0 and at most 1")
        share = torch.full((), float(share), dtype=torch.float64, device=weights.device)
    limit = _limit("choose_top_p", share.to(torch.float64), weights)
    return _choose("choose_top_p", "mass", weights, limit, grid.columns, grid, sinks, local, forced, inside, max_tiles, impl)


def choose_threshold(
    scores: Tensor, threshold: float | Tensor, grid: TileGrid, *, sinks: int = 0, local: int = 0, forced: Tensor | None = None,
    max_tiles: int | None = None, impl: Impl = "auto",
) -> Selection:  # fmt: skip
    """Every tile whose score is above the threshold, a number or a tensor broadcastable to `(B, H, Tq)`.

    Both are compared in float32 (float64 for float64 scores).

    The other arguments are those of `choose_top_k`.
    """
    _check(scores, grid, "choose_threshold")
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), float(threshold), dtype=torch.float64, device=scores.device)
    limit = _limit("choose_threshold", threshold.to(exact(scores)), scores)
    return _choose("choose_threshold", "threshold", scores, limit, grid.columns, grid, sinks, local, forced, True, max_tiles, impl)


def choose_tiles(scores: Tensor, budget: Budget | float | int | Mass | Threshold, grid: TileGrid, **options: object) -> Selection:
    """By a Budget: a share of the visible tiles, a number of *tokens* rounded up to tiles, a Mass or a Threshold."""
    amount = Budget.of(budget).amount
    if isinstance(amount, Mass):
        return choose_top_p(scores, float(amount.share), grid, **options)  # type: ignore[arg-type]
    if isinstance(amount, Threshold):
        return choose_threshold(scores, float(amount.value), grid, **options)  # type: ignore[arg-type]
    count = amount if isinstance(amount, float) else math.ceil(amount / grid.block_k)
    return choose_top_k(scores, count, grid, **options)  # type: ignore[arg-type]


def _share_counts(share: float, grid: TileGrid, device: torch.device) -> Tensor:
    """`ceil(share * visible tiles)` of each query tile, int32 `(Tq,)`, computed where it is needed."""
    if grid.causal:
        _, last = row_tiles(grid.n_q, grid.block_q, grid.offset, device)
        visible = (last.clamp(min=0) + grid.block_k - 1) // grid.block_k
    else:
        visible = torch.full((grid.rows,), grid.columns, device=device)
    # 0.1 * 70 is 7.000000000000001 in binary: rounding first keeps the ceiling where a reader expects it
    return ((visible.double() * share * 1e9).round() / 1e9).ceil().to(torch.int32)


def _limit(op: str, limit: Tensor, scores: Tensor) -> Tensor:
    if limit.device != scores.device:
        raise ValueError(f"{op}: the limits are on {limit.device} and the scores on {scores.device}: put them on one device")
    try:
        return limit.expand(scores.shape[:3])
    except RuntimeError:
        raise ValueError(f"{op}: limits of shape {tuple(limit.shape)} do not fit rows {tuple(scores.shape[:3])}") from None


def _check(scores: Tensor, grid: TileGrid, op: str) -> None:
    if not isinstance(scores, Tensor) or scores.ndim != 4 or not scores.is_floating_point():
        given = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{op}: scores are {given}: expected floating point (B, H, {grid.rows}, {grid.columns})")
    if scores.shape[2:] != (grid.rows, grid.columns):
        raise ValueError(
            f"{op}: scores have {scores.shape[2]} x {scores.shape[3]} tiles, the grid over {grid.n_q} queries and {grid.n_k} keys has "
            f"{grid.rows} x {grid.columns}"
        )


def _choose(
    op: str, rule: str, scores: Tensor, limit: Tensor, most: int, grid: TileGrid, sinks: int, local: int, forced: Tensor | None,
    inside: bool, max_tiles: int | None, impl: Impl,
) -> Selection:  # fmt: skip
    for name, size in (("sinks", sinks), ("local", local)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"{op}: {name}={size!r} is not a number of tokens from 0 on")
    certain = grid.most_forced(sinks, local)
    if forced is not None:
        if forced.dtype != torch.bool:
            raise TypeError(f"{op}: forced is {forced.dtype}: expected a bool mask over tiles")
        try:
            forced = forced.expand(scores.shape)
        except RuntimeError:
            raise ValueError(f"{op}: forced of shape {tuple(forced.shape)} does not fit scores {tuple(scores.shape)}") from None
    if max_tiles is not None:
        if isinstance(max_tiles, bool) or not isinstance(max_tiles, int) or max_tiles < max(1, certain):
            raise ValueError(f"{op}: max_tiles={max_tiles!r} is less than the {max(1, certain)} tiles that a row may need at least")
        width = min(max_tiles, grid.columns)
    elif forced is not None or rule != "count":
        width = grid.columns
    else:
        # a nan in the scores may ask for more than the count: it then takes the place of the lowest scores
        width = min(grid.columns, max(most, certain) if inside else most + certain)
    width = max(width, min(1, grid.columns))
    unsupported = None
    if scores.dtype == torch.float64:
        unsupported = "the kernel compares scores in float32, not float64"
    elif grid.columns > WIDEST_ROW:
        unsupported = f"the kernel holds rows of up to {WIDEST_ROW} tiles, not {grid.columns}"
    fast = use_triton(op, impl, scores, unsupported)
    if fast and scores.numel():
        from saccade.ops.estimate.triton import choose

        starts, counts = choose.choose(
            scores, limit, forced, rule, grid.n_q, grid.n_k, grid.block_q, grid.block_k, grid.causal, sinks, local, inside, width
        )
    else:
        starts, counts = reference.choose(
            scores if scores.dtype == torch.float64 else scores.float(), rule, limit, grid, sinks=sinks, local=local, forced=forced,
            inside=inside, width=width,
        )  # fmt: skip
    note(op, "triton" if fast else "reference", scores, grid.n_q, grid.n_k)
    return Selection(
        n_q=grid.n_q, n_k=grid.n_k, block_q=grid.block_q, block_k=grid.block_k, starts=starts, start_counts=counts,
        tokens=starts[..., :0], token_counts=torch.zeros_like(counts), causal=grid.causal,
    )  # fmt: skip
