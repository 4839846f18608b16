"""Spans that grow with the length: the rules, what each costs, and what each loses. Source: moa, arXiv 2406.14909, section 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def span_rules(shortest: int, step: int, most: int, betas: int) -> Tensor:
    """Rules (alpha, beta) with 0 < alpha + beta * n <= n at the shortest length: float64 `(R, 2)`.

    alpha in steps from -shortest to `most`, beta equally spaced in [0, 1]. (0, 1), which reads everything, is always among them.
    """
    alphas = [-shortest + step * i for i in range((most + shortest) // step + 1)]
    slopes = [i / (betas - 1) for i in range(betas)] if betas > 1 else [0.0]
    found = {(float(a), b) for a in {*alphas, 0} for b in slopes if 0 < a + b * shortest <= shortest} | {(0.0, 1.0)}
    return torch.tensor(sorted(found), dtype=torch.float64)


def blocks_read(rules: Tensor, n: int, block: int) -> Tensor:
    """Blocks of the window of each rule at length n, int64 `(R,)`: block distances below span / block are read."""
    span = (rules[:, 0] + rules[:, 1] * n).clamp(min=1, max=n)
    return torch.ceil(span / block).long()


def rule_costs(rules: Tensor, lengths: list[int], block: int) -> Tensor:
    """Tile density of each rule at each length, `(R, lengths)`: tiles read / tiles on and below the diagonal."""
    columns = []
    for n in lengths:
        tiles = math.ceil(n / block)
        row = torch.arange(1, tiles + 1)
        window = torch.minimum(row, blocks_read(rules, n, block).unsqueeze(1))
        # rows whose window ends after the first block read that as well
        read = window + (row > window).long()
        columns.append(read.sum(1).double() / int(row.sum()))
    return torch.stack(columns, 1)


def rule_losses(found: dict[str, Tensor], lengths: list[int], rules: Tensor, block: int) -> Tensor:
    """Loss of each rule in each group of heads at each length, float64 `(Hk, R, lengths)`.

    found: `effect.{n}` `(Hk, group, T, T)` summed over samples, and their number `samples.{n}`. The absolute means over the tiles
    that a rule masks are added up; a group counts as its worst head.
    """
    columns = []
    for n in lengths:
        effect = (found[f"effect.{n}"] / found[f"samples.{n}"]).abs().double().cpu()
        tiles = effect.shape[-1]
        effect[..., 0] = 0.0  # the first block is always read
        distance = torch.arange(tiles).unsqueeze(1) - torch.arange(tiles)
        by_distance = torch.stack([effect[..., distance == d].sum(-1) for d in range(tiles)], -1)
        beyond = by_distance.flip(-1).cumsum(-1).flip(-1)  # at distance d or more
        beyond = torch.nn.functional.pad(beyond, (0, 1))
        columns.append(beyond[..., blocks_read(rules, n, block).clamp(max=tiles)].amax(1))
    return torch.stack(columns, -1)
