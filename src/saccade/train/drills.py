"""Drills: the same sentences as the exams, but with many facts and many questions in a sequence.

An exam teaches from a handful of bytes in a sequence of thousands. A drill fills a share of the sequence with facts and
asks for each at a random later place or at the end, so that every sequence teaches retrieval at many distances.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from saccade.train import text as t
from saccade.train.exams import (
    SMALLEST_HAYSTACK,
    chain_lines,
    copy_pieces,
    dictionary_ask,
    dictionary_entries,
    needle_ask,
    needle_fact,
    noisy_depths,
    variable_ask,
)
from saccade.train.pieces import ANSWER, PLAIN, STATED, TEMPLATE, Event, Piece, piece, size, weave
from saccade.train.text import Grammar

SHOWN, AT_ONCE = 8, 9  # tags; 0 to 3 are the hops of a question, 4 to 7 the same for short names
AT_THE_END = 0.35  # share of the questions that are asked at the end of the sequence


class _Drill:
    """A sequence in the making: events in the haystack and questions at its end."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.events: list[Event] = []
        self.tail: list[list[Piece]] = []
        self.used = 0

    def state(self, depth: float, pieces: list[Piece]) -> None:
        self.events.append(Event(depth, pieces))
        self.used += size(pieces)

    def ask(self, after: float, pieces: list[Piece]) -> None:
        """Ask at the end, or at a random depth after `after`."""
        if self.rng.random() < AT_THE_END:
            self.tail.append(pieces)
        else:
            self.events.append(Event(self.rng.uniform(after, 1.0), pieces))
        self.used += size(pieces)

    def finish(self, grammar: Grammar, n: int) -> list[Piece]:
        self.rng.shuffle(self.tail)
        haystack = grammar.haystack(self.rng, max(SMALLEST_HAYSTACK, n - self.used))
        return weave(haystack, self.events) + [p for pieces in self.tail for p in pieces]


def needles(grammar: Grammar, rng: Random, n: int) -> list[Piece]:
    """Needles of one noun, each asked for once or twice, in 5% to 60% of the sequence."""
    drill = _Drill(rng)
    noun = rng.choice(t.NOUNS)
    room = rng.uniform(0.05, 0.6) * n
    keys: set[str] = set()
    while not keys or drill.used < room:
        key, value = grammar.key(rng), grammar.value(rng)
        if key in keys:
            continue
        keys.add(key)
        depth = rng.random()
        drill.state(depth, needle_fact(noun, key, value))
        for _ in range(rng.choice((1, 1, 2))):
            drill.ask(depth, needle_ask(noun, key, value))
    return drill.finish(grammar, n)


def dictionary(grammar: Grammar, rng: Random, n: int) -> list[Piece]:
    """A dictionary, sometimes with haystack before and after it, then questions in 3% to 50% of the sequence."""
    room = rng.uniform(0.03, 0.5) * n
    spare = rng.uniform(0.0, 0.5) * (n - room) if rng.random() < 0.3 else 0.0
    entries = dictionary_entries(grammar, rng, int(n - room - spare) - 8)
    before = int(spare * rng.random())
    asks: list[Piece] = []
    used = 0
    for key in rng.sample(list(entries), len(entries)):
        pieces = dictionary_ask(key, entries[key])
        used += size(pieces)
        if asks and used > room:
            break
        asks += pieces
    return [
        piece(grammar.haystack(rng, before), PLAIN),
        piece(("\n" if before else "") + t.dictionary_open, TEMPLATE),
        *(piece(t.dictionary_line(*entry), STATED) for entry in entries.items()),
        piece(t.dictionary_close, TEMPLATE),
        piece(grammar.haystack(rng, int(spare) - before), PLAIN),
        piece("\n" if spare else "", PLAIN),
        *asks,
    ]


def copy(grammar: Grammar, rng: Random, n: int) -> list[Piece]:
    """Passages of 32 to 200 bytes, each copied once, in 10% to 60% of the sequence."""
    drill = _Drill(rng)
    room = rng.uniform(0.1, 0.6) * n
    while not drill.events or drill.used < room:
        passage = grammar.haystack(rng, rng.randint(32, 200))
        depth = rng.random() ** 2  # early passages make far copies
        drill.state(depth, [piece(b"\n" + t.copy_open + passage + t.copy_close, PLAIN)])
        drill.ask(depth, copy_pieces(passage))
    return drill.finish(grammar, n)


def variables(grammar: Grammar, rng: Random, n: int, letters: Sequence[int] = (4,)) -> list[Piece]:
    """Chains of 1 to 3 hops in 15% to 100% of the sequence, mostly much; the value is asked for after any of the hops.

    All names of a sequence have one length, out of `letters`. The lines are placed in one of three ways: as in the
    exam, in order, or anywhere. Two helps make following a chain learnable. In some sequences questions follow their
    line at once. In others every second copy is followed by the value itself: the model, which cannot know where,
    learns to look the value up at every copy, and later questions can find it there.
    """
    drill = _Drill(rng)
    length = rng.choice(letters)
    limit = len(t.NAME_LETTERS) ** length * 3 // 4
    room = (1 - 0.85 * rng.random() ** 2) * n
    style = rng.choice(("exam", "exam", "ordered", "anywhere"))
    at_once = rng.choice((0.0, 0.0, 0.0, 0.5))
    shown = rng.choice((0.0, 0.5))
    taken: set[str] = set()
    while len(taken) + 4 <= limit:
        hops = rng.randint(1, 3)
        names = [grammar.name(rng, length) for _ in range(hops + 1)]
        if len({*names} - taken) <= hops:
            continue
        taken |= {*names}
        value = grammar.number(rng)
        lines = [piece(line, TEMPLATE) for line in chain_lines(names, value)]
        asked = {
            hop: variable_ask(names[hop], value, tag=hop if length == 4 else hop + 4)
            for hop in range(hops + 1)
            if rng.random() < (0.8 if hop else 0.3)
        }
        if drill.events and drill.used + size(lines) + sum(map(size, asked.values())) > room - SMALLEST_HAYSTACK:
            break
        depths = noisy_depths(rng, hops + 1) if style == "exam" else [rng.random() for _ in names]
        if style == "ordered":
            depths.sort()
        for hop, line in enumerate(lines):
            known = max(depths[: hop + 1])  # where the last of the lines that the answer needs stands
            pieces = [line]
            if hop and known == depths[hop] and rng.random() < shown:
                pieces.append(piece(value + "\n", ANSWER, SHOWN))
            elif hop in asked and known == depths[hop] and rng.random() < at_once:
                pieces += [p._replace(tag=AT_ONCE) for p in asked[hop]]
            elif hop in asked:
                drill.ask(known, asked[hop])
            drill.state(depths[hop], pieces)
    return drill.finish(grammar, n)
