"""How the query heads that share a key head agree on one score: from one row a query head to one row a group.

    none         one row for each query head
    group_max    max over the query heads of a group; nan where one of them is nan
    group_sum    their sum
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reduce = Literal["none", "group_max", "group_sum"]
REDUCTIONS = ("none", "group_max", "group_sum")


def check_reduce(op: str, reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce {reduce!r} is not one of {', '.join(REDUCTIONS)}")


def over_group(scores: Tensor, reduce: str) -> Tensor:
    """Scores `(..., group, n)` as they are, or one row `(..., n)` a group."""
    if reduce == "group_max":
        return scores.amax(-2)
    return scores.sum(-2) if reduce == "group_sum" else scores


def rows_of(query_heads: int, kv_heads: int, reduce: str) -> int:
    """Rows of scores that are left of so many query heads."""
    return query_heads if reduce == "none" else kv_heads
