"""What an index holds for every cached token: columns that grow and are cut together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from saccade.parts.growing import Growing


def extend(state: dict[str, Any], **columns: Tensor) -> None:
    """Add rows `(B, H, m, ...)` to the named columns of a state; those that are not there yet begin with them."""
    for name, new in columns.items():
        if name in state:
            state[name].append(new)
        else:
            state[name] = Growing(new)


def cut(state: dict[str, Any], n: int, *names: str) -> int:
    """Keep at most the first n rows of the named columns; returns how many are left, 0 where there are none."""
    left = 0
    for name in names:
        if name in state:
            state[name].truncate(n)
            left = state[name].n
    return left
