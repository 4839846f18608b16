"""What a task is: a seeded maker of prompts whose answers are known, and a score for what a model wrote."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Literal, Self

from saccade.evaluate.score import exact
from saccade.train.text import Grammar

ANSWER_SLOT = b"{answer}"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt: `context` holds the facts and `question` follows it; a query-agnostic run compresses before the
    question.

    answers: what a right output says. With `followups`, answer 0 belongs to `question` and answer i to followup i - 1,
    each asked after the model has answered the one before; otherwise all answers are expected in the one output. In a
    followup, `{answer}` stands for what the model itself answered just before.
    depths: where the facts that are asked for stand, as shares of the haystack in [0, 1]; empty where it means nothing.
    """

    context: bytes
    question: bytes
    answers: tuple[bytes, ...]
    depths: tuple[float, ...] = ()
    followups: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A frozen bag of settings. `make` draws a sample; the same generator state, text and length give the same bytes.

    name: what the command line calls it. summary: one line for listings. unit: "accuracy" (score in [0, 1]) or "bits"
    (per byte, lower is better). stops: an output ends at the first of these, or when it is as long as the answer can
    be.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    unit: ClassVar[Literal["accuracy", "bits"]] = "accuracy"
    stops: ClassVar[tuple[bytes, ...]] = (b"\n",)

    @property
    @abstractmethod
    def minimum(self) -> int:
        """The fewest bytes of context and question of which a sample can be made, whatever the draw (ASCII text)."""

    @abstractmethod
    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        """A sample of exactly `n_bytes`, which is at least `minimum`."""

    def make(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        """A sample whose context and question together are exactly `n_bytes` long.

        Raises ValueError below the task's `minimum`, and when the grammar's text is too short for the haystack.
        """
        if n_bytes < self.minimum:
            raise ValueError(f"task {self.name} needs a prompt of at least {self.minimum} bytes, not {n_bytes}: ask for a greater length")
        return self.draw(rng, grammar, n_bytes)

    @property
    def chance(self) -> float:
        """The score of one that finds the candidates in the context and guesses among them."""
        return 0.0

    def at(self, index: int) -> Self:
        """The variant that sample `index` of a run uses, so that depths and hops are covered evenly, not by luck."""
        return self

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        """How right `outputs` (one for the question and one for each followup) are, in [0, 1]. Default: exact match."""
        return float(exact(outputs[0], sample.answers[0]))

    def room(self, sample: Sample, turn: int) -> int:
        """The most bytes an output needs: the answer, and two more that show where it ends."""
        return len(sample.answers[turn]) + 2


@dataclass(frozen=True, kw_only=True)
class DepthTask(Task):
    """A task about a fact at a chosen depth of the haystack; the samples of a run go round the grid `depths`."""

    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        if not isinstance(self.depths, tuple | list) or not self.depths:
            raise ValueError(f"task {self.name} got depths={self.depths!r}: give a tuple of shares in [0, 1], such as (0.5,)")
        if not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"task {self.name} got depths={self.depths!r}: each must be a share of the context in [0, 1]")
        object.__setattr__(self, "depths", tuple(float(depth) for depth in self.depths))

    def at(self, index: int) -> Self:
        return replace(self, depths=(self.depths[index % len(self.depths)],))


def fresh_key(rng: Random, grammar: Grammar, taken: set[str]) -> str:
    """A key that is not in `taken`, to which it is added; it gets a number when the words have run out."""
    for _ in range(50):
        key = grammar.key(rng)
        if key not in taken:
            break
    else:
        key = f"{grammar.key(rng)}-{len(taken)}"
    taken.add(key)
    return key


def count_field(task: str, field: str, value: object, least: int, most: int) -> None:
    """Raise ValueError unless the setting `field` is a whole number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"task {task} got {field}={value!r}: expected a whole number from {least} to {most}")
