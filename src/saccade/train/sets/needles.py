"""Needle text: facts hidden in Python sources and asked for at the end, in the sentences that the evaluation uses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from saccade.models.pocket.tokenizer import PAD, VOCABULARY, build_tokenizer
from saccade.train import exams
from saccade.train.corpus import common_words, load_corpus
from saccade.train.data import pack
from saccade.train.pieces import SCORED, Kind
from saccade.train.sets.base import IGNORE, Batch, TokenSet, derive_seed, require
from saccade.train.text import Grammar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@cache
def _grammar(folder: Path | None, megabytes: float) -> Grammar:
    text, _ = load_corpus(megabytes, None if folder is None else [folder])
    return Grammar(text, common_words(text))


@dataclass(frozen=True, kw_only=True)
class Needles(TokenSet):
    """length: tokens of a sequence (bytes of text). count: facts in it. asked: how many of them are asked for. plain: put a loss on the
    text around them as well. folder: Python sources to hide them in; those beside the interpreter if not given. megabytes: how much of
    them is read.
    """

    name: ClassVar[str] = "needles"

    length: int = 512
    count: int = 1
    asked: int = 1
    plain: bool = False
    folder: Path | None = None
    megabytes: float = 4.0

    def __post_init__(self) -> None:
        require(1 <= self.asked <= self.count, f"asked is {self.asked}, expected 1 to {self.count}, the count of facts")
        need = 64 + 80 * self.count + 160 * self.asked  # bytes of the longest sentences and a little text
        require(self.length >= need, f"length is {self.length}, expected at least {need} for {self.count} facts and their questions")
        require(self.folder is None or self.folder.is_dir(), f"the folder {self.folder} does not exist: give one with Python sources")

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def context(self) -> int:
        return self.length

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return build_tokenizer()

    def fingerprint(self) -> str:
        return f"{derive_seed(_grammar(self.folder, self.megabytes).text):016x}"

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        grammar = _grammar(self.folder, self.megabytes)
        rng = Random(int(torch.randint(2**62, (), generator=generator)))
        rows = [self._row(grammar, rng) for _ in range(batch)]
        return torch.stack([ids for ids, _ in rows]), torch.stack([targets for _, targets in rows])

    def _row(self, grammar: Grammar, rng: Random) -> tuple[Tensor, Tensor]:
        made = exams.needles(grammar, rng, self.length, self.count, self.asked)
        ids, weights, _ = pack([(Kind.NEEDLES, made)], self.length)
        counts = (weights > 0) if self.plain else (weights >= SCORED)
        targets = torch.where(counts & (ids != PAD), ids, IGNORE)
        return ids[:-1], targets[1:]
