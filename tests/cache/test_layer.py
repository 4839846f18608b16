"""KVLayer against a list of entries: whatever happens to a cache, every array about an entry stays with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.cache.plain import Plain

from saccade.cache import KVLayer, PackedSegment, Rectangle, Slots

HEADS, DIM = 2, 3


@dataclass(frozen=True)
class Entry:
    """position: place in the sequence, padding counted. number: written into key and value. score: a side array."""

    position: int
    number: float
    score: float = 0.0


@dataclass
class Row:
    """sealed, open: entries per head, oldest first. padding: places of padding. name: goes with the state of a
    method."""

    sealed: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(HEADS)])
    open: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(HEADS)])
    padding: list[int] = field(default_factory=list)
    name: float = 0.0

    def take_back(self, position: int) -> None:
        self.sealed, self.open = (
            [[e for e in head if e.position < position] for head in heads] for heads in (self.sealed, self.open)
        )
        self.padding = [p for p in self.padding if p < position]


class Both:
    """A KVLayer and the lists it must equal, changed together."""

    def __init__(self, batch: int, rng: Random) -> None:
        self.layer, self.rng, self.seen, self.numbers = KVLayer(), rng, 0, 0
        self.rows = [Row() for _ in range(batch)]
        self.scored = False

    # -- what may happen to a cache ------------------------------------------------------------------------------------

    def append(self, padded: bool) -> None:
        m = self.rng.choice([1, 1, 2, 5])
        batch = len(self.rows)
        first = self.numbers + torch.arange(batch * HEADS * m).reshape(batch, HEADS, m, 1).double()
        self.numbers += batch * HEADS * m
        real = None
        if padded and m > 1:
            real = torch.tensor([[self.rng.random() < 0.6 for _ in range(m)] for _ in range(batch)])
            real = None if bool(real.all()) else real
        self.layer.expect(real)
        self.layer.update(first.expand(-1, -1, -1, DIM), -first.expand(-1, -1, -1, DIM + 1))
        for b, row in enumerate(self.rows):
            for i in range(m):
                if real is not None and not real[b, i]:
                    row.padding.append(self.seen + i)
                    continue
                for h in range(HEADS):
                    row.open[h].append(Entry(self.seen + i, float(first[b, h, i])))
        self.seen += m

    def crop(self, padded: bool) -> None:
        removed = self.rng.randint(0, min(6, self.seen))
        self.layer.crop(-removed)
        self.seen -= removed
        for row in self.rows:
            row.take_back(self.seen)

    def reorder(self, padded: bool) -> None:
        order = [self.rng.randrange(len(self.rows)) for _ in self.rows]
        self.layer.reorder_cache(torch.tensor(order))
        self.rows = [copy.deepcopy(self.rows[i]) for i in order]

    def repeat(self, padded: bool) -> None:
        if len(self.rows) <= 3:
            self.layer.batch_repeat_interleave(2)
            self.rows = [copy.deepcopy(row) for row in self.rows for _ in range(2)]

    def select(self, padded: bool) -> None:
        chosen = sorted(self.rng.sample(range(len(self.rows)), self.rng.randint(1, len(self.rows))))
        self.layer.batch_select_indices(torch.tensor(chosen))
        self.rows = [self.rows[i] for i in chosen]

    def copied(self, padded: bool) -> None:
        before = self.layer
        self.layer = copy.deepcopy(before)
        before.reset()
        assert before.seen == 0 and before.lengths() == [] and before.states.nbytes == 0

    def score(self, padded: bool) -> None:
        """A policy that adds to a side array."""

        def add(slots: Slots, rows: list[Row]) -> None:
            old = slots.side.get("score", torch.zeros(slots.side["positions"].shape))
            slots.side["score"] = old + slots.keys[..., 0].float()
            for row in rows:
                row.open = [[Entry(e.position, e.number, e.score + e.number) for e in head] for head in row.open]

        self._policy(add, some=True)

    def keep(self, padded: bool) -> None:
        """A policy that keeps some entries, of every head the same number."""
        self._policy(lambda slots, rows: self._keep(slots, rows, ragged=False))

    def keep_ragged(self, padded: bool) -> None:
        self._policy(lambda slots, rows: self._keep(slots, rows, ragged=True))

    def seal(self, padded: bool) -> None:
        """A policy that encodes the oldest entries, as many as every head holds."""

        def seal(slots: Slots, rows: list[Row]) -> None:
            n = min(len(head) for row in rows for head in row.open) // 2
            if not n:
                return
            side = {name: x[:, :, :n] for name, x in slots.side.items()}
            content = Rectangle(slots.keys[:, :, :n], slots.values[:, :, :n], side)
            slots.seal(Plain(content), n)
            for row in rows:
                row.sealed = [[*old, *new[:n]] for old, new in zip(row.sealed, row.open, strict=True)]
                row.open = [head[n:] for head in row.open]

        self._policy(seal)

    # -- help ----------------------------------------------------------------------------------------------------------

    def _policy(self, act: Callable[[Slots, list[Row]], None], some: bool = False) -> None:
        """Run a policy; some: where rows run one by one, it may leave rows alone."""
        if not self.seen:
            return
        each = range(len(self.rows)) if self.layer.padded else [None]
        opened = [(b, self.layer.open(b)) for b in each]
        for b, slots in opened:
            rows = self.rows if b is None else [self.rows[b]]
            assert _entries(Rectangle(slots.keys, slots.values, slots.side, slots.valid)) == [row.open for row in rows]
            if b is None or not some or self.rng.random() < 0.7:
                act(slots, rows)
        self.layer.close(opened)

    def _keep(self, slots: Slots, rows: list[Row], *, ragged: bool) -> None:
        held = [[len(head) for head in row.open] for row in rows]
        if not ragged:
            fewest = min(n for row in held for n in row)
            count = self.rng.randint(0, fewest)
            counts = [[count] * HEADS for _ in rows]
        else:
            counts = [[self.rng.randint(0, n) for n in row] for row in held]
        longest = max(n for row in counts for n in row)
        indices = torch.zeros(len(rows), HEADS, longest, dtype=torch.int64)
        for b, row in enumerate(rows):
            for h in range(HEADS):
                chosen = sorted(self.rng.sample(range(held[b][h]), counts[b][h]))
                indices[b, h, : len(chosen)] = torch.tensor(chosen, dtype=torch.int64)
                row.open[h] = [row.open[h][i] for i in chosen]
        slots.keep(indices, torch.tensor(counts) if ragged else None)

    def tag(self) -> None:
        """Give every row a state of its own, as a method would."""
        for b, row in enumerate(self.rows):
            row.name = self.rng.random()
            if self.layer.padded:
                self.layer.states.get("cache", b)["name"] = torch.tensor([row.name], dtype=torch.float64)
        if not self.layer.padded:
            names = torch.tensor([row.name for row in self.rows], dtype=torch.float64)
            self.layer.states.get("cache", None)["name"] = names

    def check(self) -> None:
        layer = self.layer
        assert layer.get_seq_length() == self.seen
        if layer.tail is None:
            return
        for b, row in enumerate(self.rows):
            sealed: list[list[Entry]] = [[] for _ in range(HEADS)]
            opened: list[list[Entry]] = [[] for _ in range(HEADS)]
            for segment in layer.segments:
                if segment.row not in (None, b):
                    continue
                if isinstance(segment, PackedSegment):
                    part, target = _entries(segment.read_row(b))[0], opened
                else:
                    part, target = _entries(segment.read(0, segment.length))[b if segment.row is None else 0], sealed
                for h in range(HEADS):
                    target[h] += part[h]
            for h, head in enumerate(_entries(layer.tail_row(b))[0]):
                opened[h] += head
            assert sealed == row.sealed
            assert opened == row.open
            assert layer.lengths()[b] == [len(a) + len(c) for a, c in zip(row.sealed, row.open, strict=True)]
            assert layer.full_precision_lengths()[b] == max(len(head) for head in row.open)
            assert layer.real_seen(b) == self.seen - len(row.padding)
            state = layer.states.get("cache", b if layer.padded else None)
            if "name" in state:
                assert float(state["name"][0 if layer.padded else b]) == row.name
        sizes = layer.get_mask_sizes(4)
        assert sizes == (layer.physical + 4, self.seen - layer.physical)


def _entries(part: Rectangle) -> list[list[list[Entry]]]:
    """Every row's heads as lists; keys and values must agree on the number."""
    batch, heads, n = part.side["positions"].shape
    assert torch.equal(part.keys, part.keys[..., :1].expand(part.keys.shape))
    assert torch.equal(part.values, -part.keys[..., :1].expand(part.values.shape))
    score = part.side.get("score", torch.zeros(batch, heads, n))
    return [
        [
            [
                Entry(int(part.side["positions"][b, h, i]), float(part.keys[b, h, i, 0]), float(score[b, h, i]))
                for i in range(n)
                if part.valid is None or part.valid[b, h, i]
            ]
            for h in range(heads)
        ]
        for b in range(batch)
    ]


OPERATIONS = ("append", "crop", "reorder", "repeat", "select", "copied", "score", "keep", "keep_ragged", "seal")


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(("append", "keep", "crop", *OPERATIONS)), min_size=6, max_size=12),
    st.integers(0, 1 << 30),
    st.integers(1, 3),
    st.booleans(),
)
def test_layer_equals_a_list_of_entries(operations: list[str], seed: int, batch: int, padded: bool) -> None:
    both = Both(batch, Random(seed))
    for _ in range(3):
        both.append(padded)
    both.tag()
    for name in operations:
        getattr(both, name)(padded)
        both.check()
