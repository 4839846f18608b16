"""Pieces of a training sequence: bytes with a loss weight, and how they are woven into a haystack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from saccade.train.text import line_break

# Loss weight of a byte. What is random cannot be predicted when it is first stated, so it hardly counts there.
PLAIN = 1.0
TEMPLATE = 0.1
STATED = 0.05
ANSWER = 6.0
COPIED = 3.0
SCORED = COPIED  # a byte of this weight or more is an answer: accuracy is measured on those


TAG = 8  # a token's kind is coded as its `Kind` plus 8 times its tag


class Kind(IntEnum):
    """What a sequence trains; the order is that of `Phase.mix`."""

    TEXT = 0
    NEEDLES = 1
    DICTIONARY = 2
    COPY = 3
    VARIABLES = 4


class Piece(NamedTuple):
    """Bytes with the loss weight of each; `tag` (0 to 30) tells groups of answers apart in the metrics."""

    text: bytes
    weight: float
    tag: int = 0


@dataclass(frozen=True)
class Event:
    """Pieces that stand at a line break of the haystack, at `depth` in [0, 1]."""

    depth: float
    pieces: list[Piece]


def piece(text: str | bytes, weight: float, tag: int = 0) -> Piece:
    """A piece from text or bytes."""
    return Piece(text.encode() if isinstance(text, str) else text, weight, tag)


def size(pieces: Sequence[Piece]) -> int:
    """The number of bytes in the pieces."""
    return sum(len(p.text) for p in pieces)


def weave(haystack: bytes, events: Sequence[Event]) -> list[Piece]:
    """Put every event before the first line break at or after its depth. Equal depths keep their order."""
    out: list[Piece] = []
    cut = 0
    for event in sorted(events, key=lambda e: e.depth):
        spot = max(cut, line_break(haystack, event.depth))
        if spot > cut:
            out.append(Piece(haystack[cut:spot], PLAIN))
        out += event.pieces
        cut = spot
    if cut < len(haystack):
        out.append(Piece(haystack[cut:], PLAIN))
    return out
