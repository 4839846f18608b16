"""The best units of a long row of keys by descending a binary tree of ranges: one score a range, not one a unit.

A row of N > K units begins as the ranges `[floor(j N / K), floor((j + 1) N / K))`. Until all ranges are single units, each is split at its
middle, each half is scored by its middle unit, and the K best halves stay: `2 K log2(N / K)` scores in all.

Source: hip, arXiv 2406.09827, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.ops.estimate.best import best_ids
from saccade.ops.estimate.common import Impl, check_heads, kernel_limits, note, rows_first, use_triton

HELD = 1 << 20  # elements of keys and scores held at a time on a CPU, so that they stay in its cache


def descend_tree(
    rows: Tensor, k: Tensor, sizes: Tensor, keep: int, *, first: int, block: int, stride: int = 1, impl: Impl = "auto"
) -> Tensor:
    """About the `keep` best of the first `sizes (T,)` units of keys for each query tile, int64 `(B, Hq, T, keep)` ascending.

    rows `(B, Hq, T, R, D)`: the rows that stand for each tile. k `(B, Hk, n_k, D)`, Hk dividing Hq, of the same dtype. sizes: int64, none
    smaller than the one before; on the CPU they are read without a host synchronisation, on a GPU only by the kernel.
    Unit u is the `block` keys from `first + u block` on, the last `block` where that leaves k, and every `stride`-th of them takes part:
    its score is the largest product with a row of the tile. A row of at most `keep` units keeps them all, and holds sizes[-1] past its
    end. Ties go to the lower unit.

    The kernel compares scores in float32. The reference computes them in the dtype of `rows`, where halves tie more often, so the two
    may choose differently among units that score alike. A key that is not a number counts as the highest score.
    ValueError where shapes and numbers do not fit.
    """
    check_heads("descend_tree", k, "k")
    _check(rows, k, sizes, keep, first, block, stride)
    fast = use_triton("descend_tree", impl, k, _unsupported(rows, k, keep, block, stride))
    note("descend_tree", "triton" if fast else "reference", rows, rows.shape[2] * rows.shape[3], k.shape[2])
    if fast:
        from saccade.ops.estimate.triton.descend import descend as descend_on_gpu

        return descend_on_gpu(rows_first(rows), rows_first(k), sizes.to(k.device, non_blocking=True), keep, first, block, stride)
    return descend(BlockScores(rows, k, first=first, block=block, stride=stride), sizes.to(k.device), keep, tuple(rows.shape[:2]))


def _check(rows: Tensor, k: Tensor, sizes: Tensor, keep: int, first: int, block: int, stride: int) -> None:
    same = rows.ndim == 5 and rows.shape[0] == k.shape[0] and rows.shape[1] % k.shape[1] == 0 and rows.shape[4] == k.shape[3]
    if not same or rows.dtype != k.dtype or rows.shape[3] < 1:
        raise ValueError(
            f"descend_tree: rows {rows.dtype} {tuple(rows.shape)} do not fit k {k.dtype} {tuple(k.shape)}: "
            "expected (B, heads, tiles, rows, D) of the same dtype"
        )
    if sizes.dtype != torch.int64 or sizes.shape != (rows.shape[2],):
        raise ValueError(f"descend_tree: sizes are {sizes.dtype} {tuple(sizes.shape)}: expected int64 ({rows.shape[2]},)")
    for name, value, least in (("keep", keep, 1), ("first", first, 0), ("block", block, 1), ("stride", stride, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"descend_tree: {name} {value!r} is not a whole number of at least {least}")


def _unsupported(rows: Tensor, k: Tensor, keep: int, block: int, stride: int) -> str | None:
    """Why the kernel can't take this, or None."""
    if rows.shape[3] > 128:
        return f"the kernel takes up to 128 rows a tile, not {rows.shape[3]}"
    if keep > 4096:
        return f"the kernel keeps up to 4096 units, not {keep}"
    if -(-block // stride) > 64:
        return f"the kernel scores a unit by up to 64 keys, not {-(-block // stride)}"
    if k.shape[2] < block:
        return f"k holds {k.shape[2]} keys, less than a unit of {block}"
    return kernel_limits(rows)


def descend(score: Callable[[Tensor, int], Tensor], sizes: Tensor, keep: int, lead: tuple[int, ...]) -> Tensor:
    """The descent with any scores, int64 `(*lead, T, keep)`, on the device of `sizes`: what `descend_tree` documents.

    score(ids, t): scores `(*lead, T - t, 2 keep)` of units `ids` of the same shape, in the rows from t on.
    """
    n = int(sizes[-1]) if len(sizes) else 0
    slots = torch.arange(keep, device=sizes.device)
    single = torch.where(slots < sizes.unsqueeze(-1), slots, n)
    begin, end = (torch.div((slots + side) * sizes.unsqueeze(-1), keep, rounding_mode="floor") for side in (0, 1))
    short = (sizes <= keep).unsqueeze(-1)
    begin = torch.where(short, single, begin).expand(*lead, -1, -1).clone()
    end = torch.where(short, single + 1, end).expand(*lead, -1, -1).clone()
    # ranges of a row differ by at most one unit, and halving keeps it so: their longest is known beforehand
    longest = torch.where(sizes <= keep, 1, -(-sizes // keep)).tolist()
    while longest and longest[-1] > 1:
        row = next(t for t, length in enumerate(longest) if length > 1)
        left, right = begin[..., row:, :], end[..., row:, :]
        middle = torch.div(left + right + 1, 2, rounding_mode="floor")
        begins = torch.stack([left, middle], dim=-1).flatten(-2)
        ends = torch.stack([middle, right], dim=-1).flatten(-2)
        found = score(torch.div(begins + ends - 1, 2, rounding_mode="floor"), row)
        # the right half of a single unit is empty
        best = best_ids(found.masked_fill(begins >= ends, -torch.inf), keep)
        begin[..., row:, :], end[..., row:, :] = torch.gather(begins, -1, best), torch.gather(ends, -1, best)
        longest = [-(-length // 2) for length in longest]
    return begin


class BlockScores:
    """The largest product of a few rows of each query tile with the keys of a block: what `descend` asks for.

    rows `(B, Hq, T, R, D)`: the rows that stand for each tile. k `(B, Hk, n_k, D)`. first: where unit 0 begins. block: keys a unit.
    stride: every stride-th key of a unit takes part.
    """

    def __init__(self, rows: Tensor, k: Tensor, *, first: int, block: int, stride: int) -> None:
        self.rows, self.first, self.block = rows, first, block
        self.within = torch.arange(0, block, stride, device=k.device)
        self.n_k = k.shape[2]
        self.keys = k.flatten(0, 2)
        heads = torch.arange(rows.shape[1], device=k.device) // (rows.shape[1] // k.shape[1])
        pairs = torch.arange(k.shape[0], device=k.device).unsqueeze(-1) * k.shape[1] + heads
        self.base = pairs * self.n_k  # (B, Hq): the first row of each head's keys

    def __call__(self, ids: Tensor, row: int) -> Tensor:
        units, m = ids.shape[-1], self.within.shape[0]
        base = self.base.unsqueeze(-1).expand(ids.shape[:3]).flatten()
        q = self.rows[:, :, row:].flatten(0, 2)
        flat = ids.flatten(0, 2)
        scores = torch.empty(flat.shape, dtype=q.dtype, device=q.device)
        held = HELD if q.device.type == "cpu" else HELD << 7
        at_once = max(1, held // (units * m * (q.shape[-1] + q.shape[-2])))
        for begin in range(0, flat.shape[0], at_once):
            here = slice(begin, begin + at_once)
            places = (flat[here] * self.block + self.first).clamp(max=self.n_k - self.block)
            places = (places.unsqueeze(-1) + self.within).flatten(1) + base[here].unsqueeze(-1)
            keys = self.keys.index_select(0, places.flatten()).view(*places.shape, -1)
            z = (q[here] @ keys.mT).amax(1)
            scores[here] = z.view(-1, units, m).amax(-1) if m > 1 else z
        return scores.view(ids.shape)
