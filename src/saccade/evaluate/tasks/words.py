"""Aggregation: which words does a long list hold most often (RULER's CWE and FWE)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.score import recall
from saccade.evaluate.tasks.base import Sample, Task, count_field
from saccade.train.text import Grammar


def _list_question(count: int) -> bytes:
    asked = f"\nQuestion: What are the {count} most common words in the list above?\n"
    return (asked + "Answer: The most common words are ").encode()


@dataclass(frozen=True, kw_only=True)
class CommonWords(Task):
    """A list of words, one a line: a few stand in it often, all others once; the frequent ones are asked for.

    common: how many frequent words. repeats: how often each stands in the list (fewer in short lists, 4 at least).
    """

    name: ClassVar[str] = "common-words"
    summary: ClassVar[str] = "the words that a list repeats, among words that occur once"
    common: int = 3
    repeats: int = 12

    def __post_init__(self) -> None:
        count_field(self.name, "common", self.common, 1, 16)
        count_field(self.name, "repeats", self.repeats, 4, 1000)

    @property
    def minimum(self) -> int:
        return len(_list_question(self.common)) + 10 * 4 * self.common * 2

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        question = _list_question(self.common)
        room = n_bytes - len(question)
        order = rng.sample(grammar.words, len(grammar.words))
        answers, others = order[: self.common], order[self.common :]
        repeats = max(4, min(self.repeats, room // (20 * self.common)))
        entries = [word for word in answers for _ in range(repeats)]
        left = room - sum(len(word) + 1 for word in entries)
        for i in range(len(entries) + left):
            # in lists longer than the vocabulary, words of their own are made by joining two
            word = others[i] if i < len(others) else f"{rng.choice(others)}-{rng.choice(others)}"
            if len(word) + 1 > left:
                break
            entries.append(word)
            left -= len(word) + 1
        rng.shuffle(entries)
        context = "\n" * left + "".join(word + "\n" for word in entries)
        return Sample(context=context.encode(), question=question, answers=tuple(word.encode() for word in answers))

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return recall(outputs[0], sample.answers)

    def room(self, sample: Sample, turn: int) -> int:
        return sum(len(answer) + 6 for answer in sample.answers)


@dataclass(frozen=True, kw_only=True)
class FrequentWords(Task):
    """A list of made-up words whose counts fall as rank^-alpha (a zeta law); the three most frequent are asked for."""

    name: ClassVar[str] = "frequent-words"
    summary: ClassVar[str] = "the three most frequent of made-up words whose counts follow a zeta law"
    alpha: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 1 < self.alpha <= 4:
            raise ValueError(f"task {self.name} got alpha={self.alpha!r}: expected an exponent above 1 and at most 4")

    @property
    def minimum(self) -> int:
        return 512

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        question = _list_question(3)
        room = (n_bytes - len(question)) // 7
        words: dict[str, None] = {}
        while len(words) < min(room, 50):
            words["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6))] = None
        ranks = list(words)
        weights = [(rank + 1) ** -self.alpha for rank in range(len(ranks))]
        # counts are set, not drawn: the three answers are never tied
        counts = [max(1, int(room * weight / sum(weights))) for weight in weights]
        entries = [word for word, count in zip(ranks, counts, strict=True) for _ in range(count)][:room]
        entries = ranks[:1] * (room - len(entries)) + entries
        rng.shuffle(entries)
        context = "\n" * (n_bytes - len(question) - 7 * room) + "".join(word + "\n" for word in entries)
        return Sample(context=context.encode(), question=question, answers=tuple(word.encode() for word in ranks[:3]))

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return recall(outputs[0], sample.answers)

    def room(self, sample: Sample, turn: int) -> int:
        return sum(len(answer) + 6 for answer in sample.answers)
