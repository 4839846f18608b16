"""Reading again what was chosen for an earlier query, as long as the query is almost the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = 32  # earlier choices held, so that guesses that are taken back do not cost a new search


class Choice(NamedTuple):
    """at: entries the layer held when it was made. fingerprint `(B, F)`: the query. ids `(B, m)` int32: what was chosen for it."""

    at: int
    fingerprint: Tensor
    ids: Tensor


class ChoiceCache:
    """The last choice of every batch row and the query it was made for; `searches` counts how often a choice was made.

    Rows decide for themselves: one that searches does not make another one search.

    Source: tokenselect, arXiv 2411.02886, section 3.3.
    """

    def __init__(self, choices: list[Choice] | None = None) -> None:
        self.choices = choices or []
        self.searches = 0

    def get(self, fingerprint: Tensor, at: int, theta: float, search: Callable[[], Tensor]) -> Tensor:
        """Ids `(B, m)` for queries with this fingerprint `(B, F)`: the last ones where the cosine is at least theta, else `search()`."""
        if not self.choices:
            return self._made(Choice(at, fingerprint, search().to(torch.int32)))
        last = self.choices[-1]
        cosine = torch.cosine_similarity(fingerprint.double(), last.fingerprint.double(), dim=-1).clamp(-1, 1)
        near = (cosine >= theta).unsqueeze(-1)
        if bool(near.all()):
            return last.ids
        ids = torch.where(near, last.ids, search().to(torch.int32))
        return self._made(Choice(at, torch.where(near, last.fingerprint, fingerprint), ids))

    def _made(self, choice: Choice) -> Tensor:
        self.searches += 1
        self.choices = [*self.choices[1 - KEPT :], choice]
        return choice.ids

    def truncate(self, n: int) -> None:
        """Forget the choices made with more than n entries."""
        self.choices = [choice for choice in self.choices if choice.at <= n]

    def reorder(self, rows: Tensor) -> ChoiceCache:
        """A copy with these batch rows."""
        return ChoiceCache([Choice(at, *(x.index_select(0, rows.to(x.device)) for x in rest)) for at, *rest in self.choices])

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for choice in self.choices for x in choice[1:])
