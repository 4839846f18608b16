"""Two facts that must be joined: the value of the first is the key of the second."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from saccade.evaluate.score import exact
from saccade.evaluate.tasks.base import ANSWER_SLOT, Sample, Task, fresh_key
from saccade.evaluate.tasks.needle import ENDS, QUESTION, SENTENCE
from saccade.train.text import NOUNS, Grammar, insert_at_lines, needle_question, needle_sentence


@dataclass(frozen=True, kw_only=True)
class TwoFacts(Task):
    """Two chains "A is B", "B is VALUE" among text; the value at the end of one is asked for.

    The steps are written out: the first question asks for the value of A, the second for the value of whatever the
    model answered, and the last answer alone is scored. `direct` asks in one question: "the NOUN for the NOUN for A".
    """

    name: ClassVar[str] = "two-facts"
    summary: ClassVar[str] = "two facts that must be joined, in two questions"
    stops: ClassVar[tuple[bytes, ...]] = ENDS
    direct: bool = False

    @property
    def minimum(self) -> int:
        return 4 * SENTENCE + QUESTION + 64

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        noun, taken = rng.choice(NOUNS), set()
        facts, needles = [], []
        for _ in range(2):
            key, bridge, value = fresh_key(rng, grammar, taken), fresh_key(rng, grammar, taken), grammar.value(rng)
            depths = rng.random(), rng.random()
            facts.append((key, bridge, value, depths))
            needles.append((depths[0], needle_sentence(noun, key, bridge).encode()))
            needles.append((depths[1], needle_sentence(noun, bridge, value).encode()))
        key, bridge, value, depths = facts[0]
        if self.direct:
            question, followups, answers = needle_question(noun, f"the {noun} for {key}").encode(), (), (value,)
        else:
            question = needle_question(noun, key).encode()
            followups, answers = (needle_question(noun, ANSWER_SLOT.decode()).encode(),), (bridge, value)
        room = n_bytes - len(question) - sum(len(needle) for _, needle in needles)
        return Sample(
            context=insert_at_lines(grammar.haystack(rng, room), needles),
            question=question,
            answers=tuple(answer.encode() for answer in answers),
            depths=depths,
            followups=followups,
        )

    def score(self, sample: Sample, outputs: list[bytes]) -> float:
        return float(exact(outputs[-1], sample.answers[-1]))
