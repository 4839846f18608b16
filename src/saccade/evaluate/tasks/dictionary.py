"""A context that is nothing but a key-value dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.tasks.base import DepthTask, Sample, fresh_key
from saccade.train.text import Grammar, dictionary_close, dictionary_line, dictionary_open, dictionary_question


@dataclass(frozen=True, kw_only=True)
class Dictionary(DepthTask):
    """The value of one key of a dictionary that fills the whole context; the entry stands at the asked depth."""

    name: ClassVar[str] = "dictionary"
    summary: ClassVar[str] = "one entry of a dictionary that fills the context"
    stops: ClassVar[tuple[bytes, ...]] = (b'"', b"\n")

    @property
    def minimum(self) -> int:
        return 160

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        depth, taken = rng.choice(self.depths), set()
        key, value = fresh_key(rng, grammar, taken), grammar.value(rng)
        asked = dictionary_line(key, value)
        question = dictionary_question(key)
        room = n_bytes - len(question) - len(dictionary_open) - len(dictionary_close) - len(asked)
        lines: list[str] = []
        while True:
            line = dictionary_line(fresh_key(rng, grammar, taken), grammar.value(rng))
            if len(line) > room:
                break
            lines.append(line)
            room -= len(line)
        lines.insert(round(depth * len(lines)), asked)
        # what no entry fits into is filled with a comment above the dictionary
        filler = ("#" * (room - 1) + "\n") if room else ""
        context = filler + dictionary_open + "".join(lines) + dictionary_close
        return Sample(context=context.encode(), question=question.encode(), answers=(value.encode(),), depths=(depth,))
