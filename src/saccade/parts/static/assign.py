"""Choosing one rule for each head under bounds on the mean cost, for several objectives at once: moa's plan search.

Minimise the losses (one a length) over all assignments with mean cost <= bound in every cost (one a length) and at most so many
different rules in a layer. Assignments are built layer by layer; what is worse in every loss and every cost is dropped, so that the
whole Pareto set is left. It is exact as long as no more than `most` partial assignments are alive; then the most promising stay.
Source: moa, arXiv 2406.14909, section 4.3 (the paper calls a commercial solver).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

MOST = 1500
EASY = 4  # with more heads in a layer, only heads in order of their gain take the costlier of two rules
TRADES = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)  # how much a share of the budget counts against a share of the loss


@dataclass(frozen=True, eq=False)
class Assignments:
    """The Pareto set: rules `(S, layers, heads)` int64, losses `(S, lengths)` summed over heads, costs `(S, bounds)` as means.
    exact: nothing but dominated assignments was dropped."""

    rules: Tensor
    losses: Tensor
    costs: Tensor
    exact: bool


def assign_rules(losses: Sequence[Tensor], costs: Tensor, bound: float, *, rules_per_layer: int = 2, most: int = MOST) -> Assignments:
    """losses: for each layer `(heads, rules, lengths)`; costs `(rules, bounds)` of a rule in a head, in [0, 1].

    Raises ValueError when even the cheapest rules cost more than the bound.
    """
    heads = sum(x.shape[0] for x in losses)
    budget = bound * heads + 1e-9
    layers = [_layer_choices(x.double(), costs.double(), rules_per_layer) for x in losses]
    exact = all(x.shape[0] <= EASY for x in losses)
    cheapest = [cost.amin(0) for _, _, cost in layers]
    left = torch.stack(cheapest).sum(0)
    if bool((left > budget).any()):
        raise ValueError(f"no rule is cheap enough for a mean density of {bound}: allow a higher one or shorter spans")
    scale = torch.stack([loss.amax(0) for _, loss, _ in layers]).sum(0).clamp(min=1e-30)
    rules = torch.zeros(1, 0, dtype=torch.int64)
    loss, cost = torch.zeros(1, losses[0].shape[2], dtype=torch.float64), torch.zeros(1, costs.shape[1], dtype=torch.float64)
    for (picked, more_loss, more_cost), least in zip(layers, cheapest, strict=True):
        left = left - least
        states, choices = torch.meshgrid(torch.arange(len(loss)), torch.arange(len(more_loss)), indexing="ij")
        states, choices = states.flatten(), choices.flatten()
        loss, cost = loss[states] + more_loss[choices], cost[states] + more_cost[choices]
        kept = ((cost + left) <= budget).all(1).nonzero().squeeze(1)
        if len(kept) > 8 * most:
            exact, kept = False, kept[_promising(loss[kept] / scale, cost[kept] / budget, 8 * most)]
        kept = kept[_undominated(torch.cat([loss[kept], cost[kept]], 1))]
        if len(kept) > most:
            exact, kept = False, kept[_promising(loss[kept] / scale, cost[kept] / budget, most)]
        rules = torch.cat([rules[states[kept]], picked[choices[kept]]], 1)
        loss, cost = loss[kept], cost[kept]
    front = loss[_undominated(loss)]
    # plans that lose the same all stay: they may differ at lengths that are not among the objectives
    best = (loss.unsqueeze(1) == front).all(-1).any(1).nonzero().squeeze(1)
    shape = (len(best), len(losses), losses[0].shape[0])
    return Assignments(rules[best].view(shape), loss[best], cost[best] / heads, exact)


def _layer_choices(losses: Tensor, costs: Tensor, rules_per_layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """The undominated ways to give a layer's heads rules: rules `(C, heads)`, summed losses and costs."""
    heads, count, _ = losses.shape
    ways = [torch.full((heads,), r) for r in range(count)]
    if rules_per_layer > 1 and heads > 1:
        for pair in combinations(range(count), 2):
            ways += _mixtures(losses, costs, pair)
    rules = torch.stack(ways)
    loss = losses[torch.arange(heads), rules].sum(1)
    cost = costs[rules].sum(1)
    kept = _undominated(torch.cat([loss, cost], 1))
    return rules[kept], loss[kept], cost[kept]


def _mixtures(losses: Tensor, costs: Tensor, pair: tuple[int, int]) -> list[Tensor]:
    """Every way in which some heads take one and some the other rule of a pair; with many heads those in order of gain only."""
    heads = losses.shape[0]
    a, b = pair
    if heads <= EASY:
        return [torch.tensor([a if m >> h & 1 else b for h in range(heads)]) for m in range(1, (1 << heads) - 1)]
    dear, cheap = (a, b) if float(costs[a].sum()) >= float(costs[b].sum()) else (b, a)
    order = (losses[:, cheap] - losses[:, dear]).sum(1).argsort(descending=True, stable=True)
    ways = []
    for n in range(1, heads):
        way = torch.full((heads,), cheap)
        way[order[:n]] = dear
        ways.append(way)
    return ways


def _undominated(points: Tensor) -> Tensor:
    """Rows `(n, m)` that no other row equals or beats in every number (of equal rows the first stays), ascending."""
    order = torch.arange(len(points))
    for column in reversed(range(points.shape[1])):
        order = order[points[order, column].argsort(stable=True)]
    ranked, front = points[order], []
    alive = torch.ones(len(points), dtype=torch.bool)
    # in lexical order a row can only be beaten by one before it
    for i in range(len(points)):
        if alive[i]:
            front.append(i)
            alive &= ~(ranked >= ranked[i]).all(1)
    return order[torch.tensor(front, dtype=torch.int64)].sort().values


def _promising(losses: Tensor, costs: Tensor, count: int) -> Tensor:
    """Rows of shares of loss and budget that are best under one of many trades between lengths and cost; ascending."""
    lengths = losses.shape[1]
    weights = [torch.ones(lengths, dtype=losses.dtype), *torch.eye(lengths, dtype=losses.dtype) * lengths]
    share = max(1, count // (len(weights) * len(TRADES)))
    picked = [(losses @ w + trade * costs.mean(1)).argsort(stable=True)[:share] for w in weights for trade in TRADES]
    return torch.cat(picked).unique()
