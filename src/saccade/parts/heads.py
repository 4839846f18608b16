"""How heads agree on what to read: from one score per query head to one score per list of keys, or from ids to their union.

    name             lists   score of unit u
    none             Hq      s_hu: every query head chooses for itself
    group_max        Hk      max over the query heads h of a key head
    group_sum        Hk      sum over the query heads h of a key head
    max              1       max over all heads
    vote             1       sum over all heads of softmax_u(s_hu): a head's say is the same however large its scores are
    rank_interleave  1       -(turn at which u is first named), where the heads name their units in turn, best first

With one list for a group, or for all heads, each key is loaded once. The union is a rule for ids and not for scores: `union_ids`.

Sources: quest, arXiv 2406.10774 (none); delta-layer-aware, arXiv 2510.09883 (max); tokenselect, arXiv 2411.02886, section 3.2 (vote);
less-is-more, arXiv 2508.07101, section 3 (rank_interleave); a2ats, arXiv 2502.12665 (union over a group).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.lists import hits
from saccade.parts.pick import pick_best


def interleave_ranks(scores: Tensor, best: int) -> Tensor:
    """Scores `(B, H, U)` to `(B, 1, U)`: minus the turn at which a unit is first named, -inf for units that no head names.

    float32, and float64 where there are too many turns for it.

    Every head names its best unit, then every head its second best, and so on for `best` units a head, heads in their order. The c highest
    results are therefore the first c different units of that reading, and no two of them are equal.
    """
    heads, units = scores.shape[1:]
    best = min(best, units)
    ids = pick_best(scores, best)
    order = torch.sort(torch.gather(scores, -1, ids), dim=-1, descending=True, stable=True).indices
    named = torch.gather(ids, -1, order).flatten(1)
    turns = torch.arange(best, device=ids.device) * heads + torch.arange(heads, device=ids.device).unsqueeze(-1)
    exact = torch.float32 if turns.numel() <= 2**24 else torch.float64
    first = torch.full((scores.shape[0], units), torch.inf, dtype=exact, device=ids.device)
    first.scatter_reduce_(1, named, turns.flatten().to(exact).expand_as(named), "amin")
    return -first.unsqueeze(1)


# name -> rule over axes 1 and 2 of scores (B, Hk, group, U)
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores.flatten(1, 2),
    "group_max": lambda scores: scores.amax(2),
    "group_sum": lambda scores: scores.sum(2),
    "max": lambda scores: scores.amax((1, 2)).unsqueeze(1),
    "vote": lambda scores: scores.softmax(-1).sum((1, 2)).unsqueeze(1),
    "rank_interleave": lambda scores: interleave_ranks(scores.flatten(1, 2), scores.shape[-1]),
}
BY_GROUP = ("none", "group_max", "group_sum")


def check_reduction(slug: str, name: str, allowed: Sequence[str] = BY_GROUP) -> None:
    """ValueError unless `name` is one of the reductions that a method allows."""
    if name not in allowed:
        raise ValueError(f"{slug} got reduce={name!r}: expected one of {', '.join(allowed)}")


def reduce_heads(scores: Tensor, kv_heads: int, how: str) -> Tensor:
    """Scores `(B, Hq, U)` of units by query head to `(B, H, U)` by list, H as in the table above ("vote" takes scaled logits)."""
    return REDUCTIONS[how](scores.unflatten(1, (kv_heads, -1)))


def union_ids(ids: Tensor, lists: int, n: int, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The union of the ids of neighbouring heads: `(B, H, m)` in any order to ascending `(B, lists, M)` int32 and counts `(B, lists)`.

    lists: how many unions, H / lists heads each. n: ids are in [0, n); others, and those past `counts (B, H)`, count as absent.
    Past a union's count the result holds n; unions differ in length, M is the longest.
    """
    there = (ids >= 0) & (ids < n)
    if counts is not None:
        there = there & (torch.arange(ids.shape[-1], device=ids.device) < counts.unsqueeze(-1))
    grouped = ids.masked_fill(~there, n).long().unflatten(1, (lists, -1)).flatten(2)
    mask = torch.zeros(*grouped.shape[:2], n + 1, dtype=torch.bool, device=ids.device).scatter_(-1, grouped, True)[..., :n]
    return hits(mask), mask.sum(-1, dtype=torch.int32)


def read_union(ids: Tensor, lists: int, n: int, counts: Tensor | None = None) -> Selection:
    """One query reads, in every list, the keys that any of its heads named: arguments as in `union_ids`."""
    tokens, found = (x.unsqueeze(2) for x in union_ids(ids, lists, n, counts))
    return Selection(
        n_q=1, n_k=n, block_q=1, block_k=1, starts=tokens[..., :0], start_counts=torch.zeros_like(found), tokens=tokens, token_counts=found
    )
