"""Which ranks heads get: coordinates of a rotated cache are given up in eighths, head by head, the cheapest first.

A head's coordinates, in order of weight, are LEVELS groups of D / LEVELS. An order of giving up says for each group which share of all
groups was still kept when its turn came, so that one order serves every budget: a group is kept where that share is within the
budget. The first group of a head is never given up (share 0). Source: matryoshkakv, arXiv 2410.14731 (greedy search; form inferred).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 8  # ranks are D / LEVELS, 2 D / LEVELS, ..., D


def rank_of(level: int, dim: int) -> int:
    """Coordinates in the first `level` groups of `dim`; at least one."""
    return max(1, dim * level // LEVELS)


def even_shares(heads: int) -> Tensor:
    """The order `(2, heads, LEVELS)` in which all heads give up groups together."""
    shares = torch.arange(1, LEVELS + 1, dtype=torch.float32) / LEVELS
    shares[0] = 0.0
    return shares.repeat(2, heads, 1)


def levels_at(shares: Tensor, budget: float) -> Tensor:
    """How many groups are kept, int64 `(2, H)`, of an order `(2, H, LEVELS)` at `budget`, a share of all coordinates."""
    return (shares <= budget + 1e-6).sum(-1)


def error_table(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, value_basis: Tensor, places: Tensor, *, recent: int = 0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Weighted squared error of the attention output for each pair of levels `(H, LEVELS, LEVELS)` float64, keys first; the last is 0.

    Summed over queries and channels. q `(Hq, m, D)`, times the softmax scale, sits at `places (m,)` of k `(H, n, D)` and v `(H, n, Dv)`;
    all three in the coordinates that are given up, means taken off k and v. value_basis `(H, Dv, Dv)` leads back to the channels of
    which weight `(Hq, m, Dv)` says how much each counts. recent: the newest keys of each query, which stay whole.
    """
    heads, n, dim = k.shape
    value_dim = v.shape[-1]
    q, k, v, weight, value_basis = (x.to(torch.float64) for x in (q, k, v, weight, value_basis))
    back = places.to(k.device).unsqueeze(-1) - torch.arange(n, device=k.device)
    hidden, near = back < 0, back < recent
    table = torch.zeros(heads, LEVELS, LEVELS, dtype=torch.float64)
    by_head = (x.unflatten(0, (heads, -1)) for x in (q, weight))
    for h, (rows, counts) in enumerate(zip(*by_head, strict=True)):
        whole, exact = rows @ k[h].mT, v[h]
        for a in range(LEVELS, 0, -1):
            rank = rank_of(a, dim)
            logits = torch.where(near, whole, rows[..., :rank] @ k[h, :, :rank].mT)
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            probabilities = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            out, old = probabilities @ v[h], (probabilities * ~near) @ v[h]
            exact = out if a == LEVELS else exact
            for b in range(1, LEVELS + 1):
                gone = torch.arange(value_dim, device=v.device) >= rank_of(b, value_dim)
                change = (out - exact - old * gone) @ value_basis[h].mT
                table[h, a - 1, b - 1] = float((counts * change.square()).sum())
    return table


def greedy_shares(tables: Sequence[Tensor]) -> list[Tensor]:
    """The order `(2, H, LEVELS)` of each layer, keys then values, from errors by level `(H, LEVELS, LEVELS)` that add up over layers.

    In each step the head gives up a group whose error grows least; ties go to the earlier layer, the lower head, and keys.
    """
    errors = [table.tolist() for table in tables]
    levels = [[[LEVELS, LEVELS] for _ in own] for own in errors]
    shares = [torch.zeros(2, len(own), LEVELS) for own in errors]
    units = sum(2 * LEVELS * len(own) for own in errors)
    queue: list[tuple[float, int, int, int, tuple[int, int]]] = []

    def push(layer: int, head: int) -> None:
        a, b = levels[layer][head]
        now = errors[layer][head][a - 1][b - 1]
        for kind, (x, y) in enumerate(((a - 1, b), (a, b - 1))):
            if x and y:
                heapq.heappush(queue, (errors[layer][head][x - 1][y - 1] - now, layer, head, kind, (a, b)))

    for layer, own in enumerate(errors):
        for head in range(len(own)):
            push(layer, head)
    left = units
    while queue:
        _, layer, head, kind, at = heapq.heappop(queue)
        own_levels = levels[layer][head]
        if tuple(own_levels) != at:  # its head has given up a group since
            continue
        own_levels[kind] -= 1
        shares[layer][kind, head, own_levels[kind]] = left / units
        left -= 1
        push(layer, head)
    return shares
