"""Per-sequence state of the methods that run on a layer, kept in step with the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core import HeadLayout


@dataclass(frozen=True, kw_only=True)
class CallFacts:
    """What the last attention call on a layer told of it."""

    layout: HeadLayout
    scale: float
    softcap: float | None


def take_rows(state: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """A copy for these batch rows: tensors have the batch first, other objects may offer `reorder(rows)`."""
    taken: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            taken[name] = value.index_select(0, rows.to(value.device))
        elif hasattr(value, "reorder"):
            taken[name] = value.reorder(rows)
        else:
            taken[name] = value
    return taken


def state_bytes(state: dict[str, Any]) -> int:
    """Bytes held by the tensors and buffers of a state."""
    return sum(
        value.untyped_storage().nbytes() if isinstance(value, Tensor) else getattr(value, "nbytes", 0) for value in state.values()
    )


class Scope(dict[str, Any]):
    """A state inside a state."""

    def reorder(self, rows: Tensor) -> Scope:
        return Scope(take_rows(self, rows))

    @property
    def nbytes(self) -> int:
        return state_bytes(self)


class States:
    """State of each method on a layer: one for the whole batch, or one a row once rows differ by padding."""

    def __init__(self) -> None:
        self._of: dict[str, list[dict[str, Any]]] = {}
        self.rows: int | None = None  # number of rows when split

    def get(self, phase: str, row: int | None) -> dict[str, Any]:
        """The state of the method of `phase`; row must be given exactly when the states are split."""
        groups = self._of.setdefault(phase, [{} for _ in range(self.rows or 1)])
        return groups[row or 0]

    def split(self, batch: int) -> None:
        """From now on each row has its own state."""
        if self.rows is None:
            self.rows = batch
            for phase, groups in self._of.items():
                self._of[phase] = [take_rows(groups[0], torch.tensor([row])) for row in range(batch)]

    def take_rows(self, rows: Tensor) -> None:
        for phase, groups in self._of.items():
            if self.rows is None:
                self._of[phase] = [take_rows(groups[0], rows)]
            else:
                self._of[phase] = [take_rows(groups[int(row)], torch.tensor([0])) for row in rows]
        self.rows = None if self.rows is None else len(rows)

    def forget(self, phase: str) -> None:
        """Empty the states of one method; those who hold one see it empty."""
        for state in self._of.get(phase, []):
            state.clear()

    def clear(self) -> None:
        self._of.clear()
        self.rows = None

    @property
    def nbytes(self) -> int:
        return sum(state_bytes(state) for groups in self._of.values() for state in groups)
