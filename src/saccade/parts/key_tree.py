"""The best units of a long row by descending a binary tree of ranges: one score a range, not one a unit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.parts.pick import pick_best

HELD = 1 << 20  # elements of keys and scores held at a time on a CPU, so that they stay in its cache


def descend(score: Callable[[Tensor, int], Tensor], sizes: Tensor, keep: int, lead: tuple[int, ...]) -> Tensor:
    """About the `keep` best of the first `sizes (T,)` units in each of T rows, int64 `(*lead, T, keep)` ascending.

    sizes: int64, none smaller than the one before. A row of at most `keep` units keeps them all, and holds sizes[-1] past its end.
    score(ids, t): scores `(*lead, T - t, 2 keep)` of units `ids` of the same shape, in the rows from t on.

    A row of N > keep units begins as the ranges `[floor(j N / keep), floor((j + 1) N / keep))`. Until all ranges are single units, each is
    split at its middle, each half is scored by its middle unit, and the `keep` best halves stay: `2 keep log2(N / keep)` scores in all.

    Source: hip, arXiv 2406.09827, algorithm 1.
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
        best = pick_best(found.masked_fill(begins >= ends, -torch.inf), keep)
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
