"""Tokens and heads that lose their place for good, one after another, as layers and steps go by.

What has received least so far is left out of all layers after this one, also for the tokens to come. A token therefore has one number,
the last layer that reads it, which only ever falls: the sets that layers read are nested.

Source: spatten, arXiv 2012.09852, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.parts.ends import force_ends

ALL = torch.iinfo(torch.int16).max  # a last layer behind every layer
STEPS = 64  # steps that can be taken back exactly


def surviving_share(layer: int, layers: int, ratios: tuple[float, float], spared: float) -> float:
    """Share of all tokens (or heads) that may be read in a layer.

    The first `spared` of the layers, rounded up and at least one, lose nothing. Before each layer after them a share r of the survivors
    goes, r running linearly from ratios[0] at the first of these layers to ratios[1] at the last.
    """
    first = max(1, math.ceil(round(spared * layers, 9)))
    share = 1.0
    for number in range(first, layer + 1):
        way = (number - first) / max(1, layers - 1 - first)
        share *= 1 - (ratios[0] + (ratios[1] - ratios[0]) * way)
    return share


def count_of(share: float, n: int) -> int:
    """A share of n, rounded up, at least 1."""
    return max(1, math.ceil(round(share * n, 6)))


class Cascade:
    """A sequence's importances, and where its tokens and heads end.

    mass `(B, n)`: what each token has received; last `(B, n)` int16: the last layer that reads it. head_mass, head_last `(B, H)`: the same
    for heads. first: the lowest layer that takes part.
    """

    def __init__(self, batch: int, heads: int, first: int, dtype: torch.dtype, device: torch.device) -> None:
        self.first = first
        self.mass = torch.zeros(batch, 0, dtype=dtype, device=device)
        self.last = torch.zeros(batch, 0, dtype=torch.int16, device=device)
        self.head_mass = torch.zeros(batch, heads, dtype=dtype, device=device)
        self.head_last = torch.full((batch, heads), ALL, dtype=torch.int16, device=device)
        self._past: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def arrive(self, layer: int, n: int, m: int) -> None:
        """The m newest of n tokens come to a layer: the lowest layer makes room, and remembers what was before a single step."""
        if layer == self.first and n <= self.mass.shape[1]:
            self.rewind(n - m)  # guesses at a prompt's end were taken back
        if n <= self.mass.shape[1]:
            return
        if m == 1:
            self._past = [*self._past[1 - STEPS :], tuple(x.clone() for x in self._state())]  # pyright: ignore[reportAttributeAccessIssue]
        more = (0, n - self.mass.shape[1])
        self.mass, self.last = F.pad(self.mass, more), F.pad(self.last, more, value=ALL)

    def rewind(self, n: int) -> None:
        """Back to n tokens. Further back than the last 64 single steps, what later tokens have changed stays changed."""
        if n >= self.mass.shape[1]:
            return
        found = next((past for past in self._past if past[0].shape[1] == n), None)
        self._past = [past for past in self._past if past[0].shape[1] < n]
        state = tuple(x.clone() for x in found) if found is not None else self._state()
        self.mass, self.last, self.head_mass, self.head_last = (*(x[:, :n] for x in state[:2]), *state[2:])

    def prune(self, layer: int, n: int, tokens: int, heads: int, *, sinks: int, recent: int) -> None:
        """After a layer: no later one reads more than so many of the first n tokens, and of the heads, of each row.

        The first `sinks` and the last `recent` tokens go last. Ties go to the lower position.
        """
        scores = force_ends(self.mass[:, :n].clone(), tokens, sinks=sinks, recent=recent)
        self.last[:, :n] = _pruned(self.last[:, :n], scores, layer, tokens)
        self.head_last = _pruned(self.head_last, self.head_mass, layer, heads)

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mass, self.last, self.head_mass, self.head_last

    # -- as a sequence's state ---------------------------------------------------------------------------------------------

    def reorder(self, rows: Tensor) -> Cascade:
        """A copy with these batch rows."""
        new = Cascade.__new__(Cascade)
        new.first = self.first
        new.mass, new.last, new.head_mass, new.head_last = (x.index_select(0, rows.to(x.device)) for x in self._state())
        new._past = [tuple(x.index_select(0, rows.to(x.device)) for x in past) for past in self._past]  # pyright: ignore
        return new

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for past in [self._state(), *self._past] for x in past)

    def stored_fields(self) -> dict[str, Any]:
        """The contents, to be saved."""
        return dict(vars(self))


def _pruned(last: Tensor, scores: Tensor, layer: int, count: int) -> Tensor:
    """Last layers `(B, n)` after all but the `count` best of those that the next layer reads were ended at `layer`."""
    alive = last > layer
    if count >= last.shape[1]:
        return last
    ranked = torch.sort(scores.masked_fill(~alive, -torch.inf), dim=-1, descending=True, stable=True).indices
    stays = torch.zeros_like(alive).scatter(-1, ranked[:, :count], True)
    return torch.where(alive & ~stays, layer, last).to(last.dtype)
