"""Needles: facts on lines of their own in a haystack, asked for by key."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.score import exact
from saccade.evaluate.tasks.base import DepthTask, Sample, Task, count_field, fresh_key
from saccade.train.text import NOUNS, Grammar, insert_at_lines, needle_question, needle_sentence

SENTENCE = 80  # bytes that a needle with the longest noun, key and value may take
QUESTION = 128
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
ENDS = (b".", b"\n")


def hide(
    rng: Random,
    grammar: Grammar,
    n_bytes: int,
    noun: str,
    facts: list[tuple[float, str, str]],
    asked: list[tuple[str, str, float]],
) -> Sample:
    """A sample of `n_bytes` with each `(depth, key, value)` of `facts` in it, that asks for `(key, value, depth)` in
    turn."""
    needles = [(depth, needle_sentence(noun, key, value).encode()) for depth, key, value in facts]
    questions = [needle_question(noun, key).encode() for key, _, _ in asked]
    room = n_bytes - len(questions[0]) - sum(len(needle) for _, needle in needles)
    return Sample(
        context=insert_at_lines(grammar.haystack(rng, room), needles),
        question=questions[0],
        answers=tuple(value.encode() for _, value, _ in asked),
        depths=tuple(depth for _, _, depth in asked),
        followups=tuple(questions[1:]),
    )


def share_right(sample: Sample, outputs: list[bytes]) -> float:
    """Share of the questions that were answered exactly."""
    hits = [exact(output, answer) for output, answer in zip(outputs, sample.answers, strict=True)]
    return sum(hits) / len(hits)


@dataclass(frozen=True, kw_only=True)
class Needle(DepthTask):
    """One fact among text: "The magic number for KEY is VALUE." at the asked depth."""

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "one fact at a chosen depth of a haystack"
    stops: ClassVar[tuple[bytes, ...]] = ENDS

    @property
    def minimum(self) -> int:
        return SENTENCE + QUESTION

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        depth, noun = rng.choice(self.depths), rng.choice(NOUNS)
        key, value = grammar.key(rng), grammar.value(rng)
        return hide(rng, grammar, n_bytes, noun, [(depth, key, value)], [(key, value, depth)])


@dataclass(frozen=True, kw_only=True)
class NeedleMultikey(DepthTask):
    """One of several facts of the same noun: the asked one at the asked depth, the others anywhere."""

    name: ClassVar[str] = "needle-multikey"
    summary: ClassVar[str] = "one of four facts that differ in their keys"
    stops: ClassVar[tuple[bytes, ...]] = ENDS
    needles: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        count_field(self.name, "needles", self.needles, 2, 64)

    @property
    def minimum(self) -> int:
        return self.needles * SENTENCE + QUESTION

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        depth, noun, taken = rng.choice(self.depths), rng.choice(NOUNS), set()
        facts = [(rng.random() if i else depth, fresh_key(rng, grammar, taken), grammar.value(rng)) for i in range(self.needles)]
        _, key, value = facts[0]
        return hide(rng, grammar, n_bytes, noun, facts, [(key, value, depth)])


@dataclass(frozen=True, kw_only=True)
class NeedleMultiquery(Task):
    """Several facts, all asked for one after the other; the score is the share answered right."""

    name: ClassVar[str] = "needle-multiquery"
    summary: ClassVar[str] = "four facts, all asked for in turn"
    stops: ClassVar[tuple[bytes, ...]] = ENDS
    needles: int = 4

    def __post_init__(self) -> None:
        count_field(self.name, "needles", self.needles, 2, 64)

    @property
    def minimum(self) -> int:
        return self.needles * SENTENCE + QUESTION

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        noun, taken = rng.choice(NOUNS), set()
        facts = [(rng.random(), fresh_key(rng, grammar, taken), grammar.value(rng)) for _ in range(self.needles)]
        asked = [(key, value, depth) for depth, key, value in rng.sample(facts, len(facts))]
        return hide(rng, grammar, n_bytes, noun, facts, asked)

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return share_right(sample, outputs)


@dataclass(frozen=True, kw_only=True)
class NeedleMultivalue(Task):
    """One word that holds several values, told apart by an ordinal alone; all are asked for, in any order.

    RULER asks for all values of one key in one list; a model of this grammar answers one question with one value, so
    the values are "The magic number for WORD-first is ...", "... WORD-second is ..." and are asked for in turn.
    """

    name: ClassVar[str] = "needle-multivalue"
    summary: ClassVar[str] = "four values of one word, told apart by an ordinal, all asked for in turn"
    stops: ClassVar[tuple[bytes, ...]] = ENDS
    values: int = 4

    def __post_init__(self) -> None:
        count_field(self.name, "values", self.values, 2, len(ORDINALS))

    @property
    def minimum(self) -> int:
        return self.values * SENTENCE + QUESTION

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        noun, word = rng.choice(NOUNS), rng.choice(grammar.words)
        facts = [(rng.random(), f"{word}-{ordinal}", grammar.value(rng)) for ordinal in ORDINALS[: self.values]]
        asked = [(key, value, depth) for depth, key, value in rng.sample(facts, len(facts))]
        return hide(rng, grammar, n_bytes, noun, facts, asked)

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return share_right(sample, outputs)
