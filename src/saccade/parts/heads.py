"""From one score per query head to one score per list of keys: how the heads of a group agree."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# name -> rule over axis 2 of scores (B, Hk, group, U)
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda scores: scores.flatten(1, 2),
    "group_max": lambda scores: scores.amax(2),
}


def check_reduction(slug: str, name: str) -> None:
    """ValueError unless `name` is a known way of reducing."""
    if name not in REDUCTIONS:
        raise ValueError(f"{slug} got reduce={name!r}: expected one of {', '.join(REDUCTIONS)}")


def reduce_heads(scores: Tensor, kv_heads: int, how: str) -> Tensor:
    """Scores `(B, Hq, U)` of units by query head to `(B, H, U)`.

    "none": H = Hq, every query head chooses for itself. "group_max": H = kv_heads, a unit counts as much as the head
    of the group that wants it most, so that each is loaded once.
    """
    return REDUCTIONS[how](scores.unflatten(1, (kv_heads, -1)))
