"""The task mix: an endless, seeded stream of token sequences with a loss weight for every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from saccade.models.pocket.tokenizer import BOS, BYTE_OFFSET, PAD
from saccade.train import drills, exams
from saccade.train.pieces import PLAIN, TAG, Kind, Piece
from saccade.train.text import Grammar

Sample = tuple[Tensor, Tensor, Tensor]
Maker = Callable[[Grammar, Random, int], list[Piece]]

SMALLEST_PART = 512
DRILLS: dict[Kind, Maker] = {
    Kind.NEEDLES: drills.needles,
    Kind.DICTIONARY: drills.dictionary,
    Kind.COPY: drills.copy,
}
EXAMS: dict[Kind, Maker] = {
    Kind.NEEDLES: lambda grammar, rng, n: exams.needles(
        grammar, rng, n, rng.choice((1, 1, 2, 4, 8)), rng.choice((1, 1, 2, 4))
    ),
    Kind.DICTIONARY: exams.dictionary,
    Kind.COPY: exams.copy,
    Kind.VARIABLES: exams.variables,
}


class TaskMix(IterableDataset[Sample]):
    """Sequences of `context` + 1 tokens: `(ids int64, weights float32, kinds uint8)`, each `(context + 1,)`.

    Sequence i depends on `seed`, `context` and i alone, whatever the number of workers or ranks: batch b of `rank`
    holds the sequences (b * world + rank) * batch and the next `batch` - 1, and the stream begins at batch `first`.
    `mix` weighs the kinds in the order of `Kind`. A sequence is an exam with probability `exam_share`, else a drill;
    with probability `split_share` it is cut into two to five problems. Padding has weight 0. A token's weight is that
    of the byte it stands for, as a target; its kind is `Kind + 8 * tag` of its piece. `letters` are the lengths of
    variable names in drills.
    """

    def __init__(
        self,
        grammar: Grammar,
        context: int,
        batch: int,
        seed: int = 0,
        mix: Sequence[float] = (0.27, 0.18, 0.22, 0.08, 0.25),
        exam_share: float = 0.2,
        split_share: float = 0.2,
        letters: Sequence[int] = (4,),
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if len(mix) != len(Kind) or min(mix) < 0 or sum(mix) <= 0:
            raise ValueError(f"mix is {tuple(mix)}, expected {len(Kind)} weights, none negative and not all zero")
        if context < 128 or batch < 1:
            raise ValueError(f"context {context} and batch {batch} were given, expected at least 128 and 1")
        self.grammar, self.context, self.batch, self.seed, self.mix = grammar, context, batch, seed, tuple(mix)
        self.exam_share, self.split_share = exam_share, split_share
        self.first, self.rank, self.world = first, rank, world
        self.drills = DRILLS | {Kind.VARIABLES: partial(drills.variables, letters=tuple(letters))}

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        # A loader takes whole batches from its workers in turn, so worker w makes batches w, w + workers, ...
        at, stride = (self.first + worker.id, worker.num_workers) if worker else (self.first, 1)
        while True:
            start = (at * self.world + self.rank) * self.batch
            for i in range(start, start + self.batch):
                yield self.sample(i)
            at += stride

    def sample(self, i: int) -> Sample:
        """Sequence `i` of the stream."""
        return pack(self.problems(Random(f"{self.seed}/{self.context}/{i}")), self.context)

    def problems(self, rng: Random) -> list[tuple[Kind, list[Piece]]]:
        """The problems of one sequence, about `context` bytes in all."""
        parts = [self.context]
        if rng.random() < self.split_share and self.context >= 4 * SMALLEST_PART:
            cuts = sorted(rng.sample(range(self.context // SMALLEST_PART), rng.randint(1, 4)))
            edges = [0, *(SMALLEST_PART * cut for cut in cuts if cut), self.context]
            parts = [high - low for low, high in pairwise(edges)]
        return [self._problem(rng, n) for n in parts]

    def _problem(self, rng: Random, n: int) -> tuple[Kind, list[Piece]]:
        kind = rng.choices(list(Kind), self.mix)[0]
        if kind is Kind.TEXT:
            return kind, [Piece(self.grammar.haystack(rng, n), PLAIN)]
        makers = EXAMS if rng.random() < self.exam_share else self.drills
        return kind, makers[kind](self.grammar, rng, n)


def pack(problems: Sequence[tuple[Kind, list[Piece]]], context: int) -> Sample:
    """The ids, weights and kinds of `context` + 1 tokens: bos, the last `context` bytes of the problems, padding."""
    pieces = [(piece, kind) for kind, made in problems for piece in made]
    lengths = [len(piece.text) for piece, _ in pieces]
    text = np.frombuffer(b"".join(piece.text for piece, _ in pieces), np.uint8)[-context:]
    weights = np.repeat(np.array([piece.weight for piece, _ in pieces], np.float32), lengths)[-context:]
    kinds = np.repeat(np.array([kind + TAG * piece.tag for piece, kind in pieces], np.uint8), lengths)[-context:]
    ids_t = torch.full((context + 1,), PAD, dtype=torch.int64)
    weights_t = torch.zeros(context + 1)
    kinds_t = torch.zeros(context + 1, dtype=torch.uint8)
    end = 1 + len(text)  # the end is kept, not the start: questions stand at the end
    ids_t[0] = BOS
    ids_t[1:end] = torch.from_numpy(text.astype(np.int64) + BYTE_OFFSET)
    weights_t[1:end] = torch.from_numpy(weights)
    kinds_t[1:end] = torch.from_numpy(kinds)
    return ids_t, weights_t, kinds_t
