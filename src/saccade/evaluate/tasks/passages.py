"""Tasks on running text: copying a passage from far back, and predicting text."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.score import bytes_right
from saccade.evaluate.tasks.base import Sample, Task, count_field
from saccade.train.text import Grammar, copy_close, copy_open


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """A marked passage at the very start, text, then the passage's first bytes again: the rest is to be copied.

    cue: bytes of the passage that the question repeats. answer: bytes to be written after them; the score is the share
    of them that are right (see `score.bytes_right`).
    """

    name: ClassVar[str] = "copy"
    summary: ClassVar[str] = "copying a passage from the start of the context, given its first bytes"
    stops: ClassVar[tuple[bytes, ...]] = ()
    cue: int = 16
    answer: int = 64

    def __post_init__(self) -> None:
        count_field(self.name, "cue", self.cue, 4, 256)
        count_field(self.name, "answer", self.answer, 1, 1024)

    @property
    def minimum(self) -> int:
        return 2 * self.cue + self.answer + 64

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        passage = grammar.haystack(rng, self.cue + self.answer)
        question = b"\n" + copy_open + passage[: self.cue]
        marked = copy_open + passage + copy_close
        return Sample(
            context=marked + grammar.haystack(rng, n_bytes - len(question) - len(marked)),
            question=question,
            answers=(passage[self.cue :],),
            depths=(0.0,),
        )

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return bytes_right(outputs[0], sample.answers[0])

    def room(self, sample: Sample, turn: int) -> int:
        return len(sample.answers[turn]) + 8  # a stray byte must not cost the last one


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Bits per byte of the text that follows the context, read one token at a time; lower is better.

    answer: how many bytes are predicted. Nothing is asked, so query-aware and query-agnostic runs are the same.
    """

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "bits per byte of the text after the context (lower is better)"
    unit: ClassVar = "bits"
    answer: int = 128

    def __post_init__(self) -> None:
        count_field(self.name, "answer", self.answer, 16, 4096)

    @property
    def minimum(self) -> int:
        return 64

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        text = grammar.haystack(rng, n_bytes + self.answer)
        return Sample(context=text[:n_bytes], question=b"", answers=(text[n_bytes:],))
