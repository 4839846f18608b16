"""Selective copy: a few marked tokens stand among blanks; at the end they have to be named in order.

The task of Mamba (arXiv 2312.00752, section 4.1.1): what is to be kept depends on the content, so a fixed convolution can't do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from saccade.train.sets.base import IGNORE, Batch, TokenSet, require

BLANK, ASK, FIRST = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(TokenSet):
    """length: tokens among which the items stand. items: how many there are; as many ASK tokens follow, one for each. vocab: token ids:
    0 is a blank, 1 asks, the rest are items.
    """

    name: ClassVar[str] = "selective-copy"

    length: int = 256
    items: int = 16
    vocab: int = 18

    def __post_init__(self) -> None:
        require(1 <= self.items <= self.length, f"items is {self.items}, expected 1 to {self.length}, the length")
        require(self.vocab > FIRST, f"vocab is {self.vocab}, expected at least {FIRST + 1}: a blank, a question and an item")

    @property
    def vocabulary(self) -> int:
        return self.vocab

    @property
    def context(self) -> int:
        return self.length + self.items

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        at = torch.rand(batch, self.length, generator=generator).topk(self.items, dim=-1).indices.sort(-1).values
        items = torch.randint(FIRST, self.vocab, (batch, self.items), generator=generator)
        tokens = torch.full((batch, self.context), BLANK)
        tokens.scatter_(1, at, items)
        tokens[:, self.length :] = ASK
        targets = torch.full_like(tokens, IGNORE)
        targets[:, self.length :] = items
        return tokens, targets
