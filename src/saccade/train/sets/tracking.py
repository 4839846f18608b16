"""State tracking: after every token, name the product of all group elements so far.

Parity is the group of two elements, S3 the smallest that does not commute, S5 the smallest symmetric group that can't be solved: its
word problem is beyond any model whose depth does not grow with the length (Merrill et al., arXiv 2404.08819).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saccade.train.sets.base import IGNORE, Batch, TokenSet, require

Group = Literal["parity", "s3", "s4", "s5"]
_OBJECTS: dict[Group, int] = {"parity": 2, "s3": 3, "s4": 4, "s5": 5}


@cache
def product_table(group: Group) -> Tensor:
    """int64 `(G, G)`: entry `[a, b]` is the element "first a, then b". Elements are the permutations in lexical order, 0 the identity."""
    elements = list(permutations(range(_OBJECTS[group])))
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(second[x] for x in first)] for second in elements] for first in elements])


@dataclass(frozen=True, kw_only=True)
class StateTracking(TokenSet):
    """group: whose elements the tokens are: "parity" (2 elements), "s3" (6), "s4" (24) or "s5" (120). length: tokens of a sequence."""

    name: ClassVar[str] = "state-tracking"

    group: Group = "parity"
    length: int = 64

    def __post_init__(self) -> None:
        require(self.group in _OBJECTS, f"there is no group {self.group!r}: choose one of {', '.join(_OBJECTS)}")
        require(self.length >= 1, f"length is {self.length}, expected at least 1")

    @property
    def vocabulary(self) -> int:
        return len(product_table(self.group))

    @property
    def context(self) -> int:
        return self.length

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        table = product_table(self.group)
        tokens = torch.randint(len(table), (batch, self.length), generator=generator)
        targets = torch.empty_like(tokens)
        state = torch.zeros(batch, dtype=torch.int64)
        for i in range(self.length):
            state = table[state, tokens[:, i]]
            targets[:, i] = state
        return tokens, targets

    def score(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """ "accuracy" over all places, and "last", at the last one, where the whole sequence counts."""
        right = (logits.argmax(-1) == targets)[:, -1] & (targets[:, -1] != IGNORE)
        return super().score(logits, tokens, targets) | {"last": (right.sum(), (targets[:, -1] != IGNORE).sum())}
