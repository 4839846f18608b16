"""Multi-query associative recall: many pairs are stated, then every key comes back and its value has to be named.

The task of the `based` card (arXiv 2402.18668; Zoology, arXiv 2312.04927): keys from the lower half of the vocabulary, values from the
upper half, the pairs first, each key again after a gap drawn from a power law, anything in between, a loss at the queries only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from saccade.train.sets.base import IGNORE, Batch, TokenSet, distinct, require


@dataclass(frozen=True, kw_only=True)
class Recall(TokenSet):
    """length: tokens of a sequence. pairs: key-value pairs in it. fewest: if given, every batch has a number of pairs drawn evenly from
    `fewest` to `pairs` (an easier start); evaluate without it. vocab: token ids; keys are below vocab / 2. power: of the gaps, as in
    p(gap) = power * gap^(power - 1): the smaller, the sooner a key comes back.

    What fills the gaps is drawn from the values: a filler that is a key would bind it anew.
    """

    name: ClassVar[str] = "mqar"

    length: int = 256
    pairs: int = 32
    fewest: int | None = None
    vocab: int = 8192
    power: float = 0.01

    def __post_init__(self) -> None:
        require(self.pairs >= 1, f"pairs is {self.pairs}, expected at least 1")
        require(
            self.length >= 4 * self.pairs,
            f"{self.pairs} pairs and their queries take {4 * self.pairs} tokens, but length is {self.length}: give fewer pairs",
        )
        require(
            self.vocab // 2 > self.pairs, f"vocab is {self.vocab}, expected more than {2 * self.pairs + 1} for {self.pairs} different keys"
        )
        require(self.power > 0, f"power is {self.power}, expected a positive number")
        least = self.fewest
        require(least is None or 1 <= least <= self.pairs, f"fewest is {least}, expected 1 to {self.pairs}, the number of pairs")

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def context(self) -> int:
        return self.length

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        n = self.pairs
        if self.fewest is not None:
            n = int(torch.randint(self.fewest, self.pairs + 1, (), generator=generator))
        half = self.vocab // 2
        keys = distinct(generator, batch, half, n)
        values = half + distinct(generator, batch, self.vocab - half, n)
        tokens = torch.randint(half, self.vocab, (batch, self.length), generator=generator)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        gaps = torch.arange(1, (self.length - 2 * n) // 2 + 1, dtype=torch.float64)
        chances = (self.power * gaps ** (self.power - 1)).expand(batch, -1)
        at = 2 * n + 2 * torch.multinomial(chances, n, generator=generator)
        tokens.scatter_(1, at, keys)
        targets = torch.full_like(tokens, IGNORE).scatter_(1, at, values)
        return tokens, targets
