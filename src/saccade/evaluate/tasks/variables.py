"""Variable tracking: chains of assignments in a haystack (RULER's VT)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Self

from saccade.evaluate.tasks.base import Sample, Task, count_field
from saccade.train.text import Grammar, insert_at_lines, variable_copy, variable_question, variable_sentence


@dataclass(frozen=True, kw_only=True)
class Variables(Task):
    """The number that a chain "VAR A = 12345", "VAR B = VAR A", ... starts with, asked at its end; other chains
    distract.

    hops: copies between the number and the asked name, 1 to 3; None goes round 1, 2, 3 over the samples of a run.
    chains: how many chains the context holds.
    """

    name: ClassVar[str] = "variables"
    summary: ClassVar[str] = "a chain of one to three assignments, with distracting chains"
    hops: int | None = None
    chains: int = 2

    def __post_init__(self) -> None:
        if self.hops is not None:
            count_field(self.name, "hops", self.hops, 1, 3)
        count_field(self.name, "chains", self.chains, 1, 16)

    @property
    def minimum(self) -> int:
        return self.chains * 4 * 24 + 100

    @property
    def chance(self) -> float:
        # a lone chain leaves nothing to guess between, but its number must still be found
        return 1 / self.chains if self.chains > 1 else 0.0

    def at(self, index: int) -> Self:
        return self if self.hops is not None else replace(self, hops=1 + index % 3)

    def draw(self, rng: Random, grammar: Grammar, n_bytes: int) -> Sample:
        hops = self.hops or rng.randint(1, 3)
        names = self._names(rng, grammar, self.chains * (hops + 1))
        pieces: list[tuple[float, bytes]] = []
        answers = []
        for chain in range(self.chains):
            steps = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
            # one draw for each step, sorted: a name is never read before it is written
            depths = sorted(rng.random() for _ in steps)
            number = grammar.number(rng)
            answers.append((steps[-1], number, depths))
            pieces.append((depths[0], variable_sentence(steps[0], number).encode()))
            for depth, earlier, later in zip(depths[1:], steps, steps[1:], strict=False):
                pieces.append((depth, variable_copy(later, earlier).encode()))
        name, number, depths = rng.choice(answers)
        question = variable_question(name).encode()
        room = n_bytes - len(question) - sum(len(piece) for _, piece in pieces)
        return Sample(
            context=insert_at_lines(grammar.haystack(rng, room), pieces),
            question=question,
            answers=(number.encode(),),
            depths=tuple(depths),
        )

    @staticmethod
    def _names(rng: Random, grammar: Grammar, count: int) -> list[str]:
        names: dict[str, None] = {}
        while len(names) < count:
            names[grammar.name(rng)] = None
        return list(names)
