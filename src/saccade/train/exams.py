"""Exams: one problem that fills the sequence, its questions at the end. The model is scored on these.

Every function takes a `Grammar`, a `random.Random` and the length `n` in bytes, and returns pieces of about `n` bytes;
bytes of weight `ANSWER` or `COPIED` are what is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from saccade.train import text as t
from saccade.train.pieces import ANSWER, COPIED, PLAIN, STATED, TEMPLATE, Event, Piece, piece, size, weave
from saccade.train.text import Grammar

COPY_START = 8  # bytes of a copy that are given: fewer do not say which passage is meant
SMALLEST_HAYSTACK = 64


def needle_fact(noun: str, key: str, value: str) -> list[Piece]:
    """The pieces of a needle's sentence."""
    head, tail = t.needle_sentence(noun, key, value).rsplit(value + t.needle_close, 1)
    return [piece(head, TEMPLATE), piece(value, STATED), piece(t.needle_close + tail, TEMPLATE)]


def needle_ask(noun: str, key: str, value: str) -> list[Piece]:
    """The pieces of a question for a needle and its answer."""
    return [piece(t.needle_question(noun, key), TEMPLATE), piece(value, ANSWER), piece(t.needle_close[:-1], PLAIN)]


def dictionary_ask(key: str, value: str) -> list[Piece]:
    """The pieces of a question for an entry and its answer."""
    return [piece(t.dictionary_question(key), TEMPLATE), piece(value, ANSWER), piece(t.dictionary_answer_close, PLAIN)]


def variable_ask(name: str, value: str, tag: int = 0) -> list[Piece]:
    """The pieces of a question for a variable and its answer; `tag` marks the answer in the metrics."""
    question, close = piece(t.variable_question(name), TEMPLATE), piece(t.variable_answer_close, PLAIN)
    return [question, piece(value, ANSWER, tag), close]


def copy_pieces(passage: bytes) -> list[Piece]:
    """The pieces of a second copy: its first bytes are given, the rest is scored."""
    return [
        Piece(b"\n" + t.copy_open, PLAIN),
        Piece(passage[:COPY_START], STATED),
        Piece(passage[COPY_START:], COPIED),
        Piece(t.copy_close, PLAIN),
    ]


def unique_keys(grammar: Grammar, rng: Random, count: int) -> list[str]:
    """`count` different keys, in the order they were drawn."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[grammar.key(rng)] = None
    return list(keys)


def needles(
    grammar: Grammar, rng: Random, n: int, count: int = 1, questions: int = 1, depths: Sequence[float] | None = None
) -> list[Piece]:
    """`count` needles with the same noun, at `depths` (random ones if None); `questions` of them are asked for."""
    noun = rng.choice(t.NOUNS)
    facts = [(key, grammar.value(rng)) for key in unique_keys(grammar, rng, count)]
    places = list(depths) if depths is not None else [rng.random() for _ in facts]
    if len(places) != count:
        raise ValueError(f"{len(places)} depths were given for {count} needles, expected one for each")
    events = [Event(depth, needle_fact(noun, *fact)) for depth, fact in zip(places, facts, strict=True)]
    tail = [p for fact in rng.sample(facts, min(questions, count)) for p in needle_ask(noun, *fact)]
    return _fill(grammar, rng, n, events, tail)


def dictionary(grammar: Grammar, rng: Random, n: int, questions: int | None = None) -> list[Piece]:
    """A key-value dictionary that fills the sequence, then `questions` (1 to 4 if None) for its entries."""
    asked = rng.randint(1, 4) if questions is None else questions
    entries = dictionary_entries(grammar, rng, n - 60 * asked - 20)
    return [
        piece(t.dictionary_open, TEMPLATE),
        *(piece(t.dictionary_line(*entry), STATED) for entry in entries.items()),
        piece(t.dictionary_close, TEMPLATE),
        *(p for key in rng.sample(list(entries), min(asked, len(entries))) for p in dictionary_ask(key, entries[key])),
    ]


def dictionary_entries(grammar: Grammar, rng: Random, room: int) -> dict[str, str]:
    """Entries with different keys, until their lines take `room` bytes."""
    entries: dict[str, str] = {}
    while room > 0:
        key, value = grammar.key(rng), grammar.value(rng)
        if key not in entries:
            entries[key] = value
            room -= len(t.dictionary_line(key, value))
    return entries


def copy(grammar: Grammar, rng: Random, n: int) -> list[Piece]:
    """A passage of 32 to 200 bytes at the very start, and its copy at the very end."""
    passage = grammar.haystack(rng, rng.randint(32, 200))
    first = Piece(t.copy_open + passage + t.copy_close, PLAIN)
    middle = grammar.haystack(rng, max(SMALLEST_HAYSTACK, n - 2 * len(passage) - 16))
    return [first, Piece(middle, PLAIN), *copy_pieces(passage)]


def variables(grammar: Grammar, rng: Random, n: int, hops: int | None = None) -> list[Piece]:
    """1 to 3 chains of the same number of `hops` (1 to 3 if None); one question, for the last name of one chain.

    The lines of a chain lie around evenly spaced depths, with so much noise that they are often out of order.
    """
    hops = rng.randint(1, 3) if hops is None else hops
    chains = [([grammar.name(rng) for _ in range(hops + 1)], grammar.number(rng)) for _ in range(rng.randint(1, 3))]
    names, value = rng.choice(chains)
    events = [
        Event(depth, [piece(line, TEMPLATE)])
        for chain in chains
        for depth, line in zip(noisy_depths(rng, hops + 1), chain_lines(*chain), strict=True)
    ]
    return _fill(grammar, rng, n, events, variable_ask(names[-1], value, tag=hops))


def noisy_depths(rng: Random, count: int) -> list[float]:
    """Evenly spaced depths, each averaged with a random one and kept within [0.01, 0.98]."""
    return [min(0.98, max(0.01, (i / count + rng.random()) / 2)) for i in range(count)]


def chain_lines(names: Sequence[str], value: str) -> list[str]:
    """The lines of a chain: the first name holds the value, every other name copies the one before it."""
    copies = [t.variable_copy(name, other) for other, name in pairwise(names)]
    return [t.variable_sentence(names[0], value), *copies]


def _fill(grammar: Grammar, rng: Random, n: int, events: list[Event], tail: list[Piece]) -> list[Piece]:
    used = sum(size(event.pieces) for event in events) + size(tail)
    return weave(grammar.haystack(rng, max(SMALLEST_HAYSTACK, n - used)), events) + tail
