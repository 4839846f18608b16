"""The text grammar shared by training and evaluation: needles, dictionaries, variables and copies in a haystack.

Sentences are fixed strings, so a model trained on them is tested on exactly what it learnt. All randomness comes from
the `random.Random` that is passed in: one seed gives one text, on any machine, for the same haystack and words.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

NOUNS = ("magic number", "secret code", "special value", "access token")
NAME_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and no O: they look like digits

copy_open = b"<<"
copy_close = b">>\n"
needle_close = ".\n"
dictionary_open = "{\n"
dictionary_close = "}\n"
dictionary_answer_close = '"\n'
variable_answer_close = "\n"


def needle_sentence(noun: str, key: str, value: str) -> str:
    """The fact that is hidden in the haystack, on a line of its own."""
    return f"\nThe {noun} for {key} is {value}{needle_close}"


def needle_question(noun: str, key: str) -> str:
    """The question for a hidden fact; the value is what comes next."""
    return f"\nQuestion: What is the {noun} for {key}?\nAnswer: The {noun} for {key} is "


def dictionary_line(key: str, value: str) -> str:
    """One entry of a key-value dictionary."""
    return f'"{key}": "{value}",\n'


def dictionary_question(key: str) -> str:
    """The question for one entry; the value and a closing quote come next."""
    return f'd["{key}"] == "'


def variable_sentence(name: str, value: str) -> str:
    """The start of a chain: a variable that holds a number."""
    return f"\nVAR {name} = {value}\n"


def variable_copy(name: str, other: str) -> str:
    """One hop of a chain: `name` takes the value of `other`."""
    return f"\nVAR {name} = VAR {other}\n"


def variable_question(name: str) -> str:
    """The question for a variable; the number at the start of its chain comes next."""
    return f"\nQuestion: which value does VAR {name} hold?\nAnswer: "


def insert_at_lines(haystack: bytes, pieces: Sequence[tuple[float, bytes]]) -> bytes:
    """Put each `(depth, piece)` before the first line break at or after `depth`, in order of depth.

    `depth` is a share of the haystack in [0, 1]. Where no line break follows, the piece goes to the end. Raises
    ValueError for a depth outside [0, 1].
    """
    out: list[bytes] = []
    cut = 0
    for depth, piece in sorted(pieces, key=lambda pair: pair[0]):
        spot = max(cut, line_break(haystack, depth))
        out += [haystack[cut:spot], piece]
        cut = spot
    return b"".join([*out, haystack[cut:]])


def line_break(haystack: bytes, depth: float) -> int:
    """The offset of the first line break at or after `depth` (a share in [0, 1]), or the haystack's length."""
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}, expected a share of the haystack in [0, 1]")
    found = haystack.find(b"\n", int(depth * max(0, len(haystack) - 1)))
    return len(haystack) if found < 0 else found


class Grammar:
    """Random haystacks, keys and values.

    `text` is what haystacks are cut from (bytes; a cut may begin anywhere), `words` what keys and some values are made
    of. Raises ValueError when either is empty.
    """

    def __init__(self, text: bytes, words: Sequence[str]) -> None:
        if not text or not words:
            raise ValueError(f"the grammar got {len(text)} bytes of text and {len(words)} words, expected some of both")
        self.text = text
        self.words = list(words)

    def haystack(self, rng: Random, n: int) -> bytes:
        """`n` consecutive bytes of the text. Raises ValueError when the text is not longer than `n` + 1 bytes."""
        if not 0 <= n < len(self.text) - 1:
            raise ValueError(f"a haystack of {n} bytes was asked of a text of {len(self.text)}; pass a longer text")
        start = rng.randrange(len(self.text) - n - 1)
        return self.text[start : start + n]

    def key(self, rng: Random) -> str:
        """One word (a quarter of the time) or two words joined by a hyphen."""
        return "-".join(rng.choice(self.words) for _ in range(rng.choice((1, 2, 2, 2))))

    def value(self, rng: Random) -> str:
        """A number of 5 to 9 digits (60%), 8 or 12 hexadecimal digits (20%), or two words (20%)."""
        kind = rng.random()
        if kind < 0.6:
            digits = rng.randint(4, 8)
            return str(rng.randrange(10**digits, 10 ** (digits + 1)))
        if kind < 0.8:
            digits = rng.choice((8, 12))
            return f"{rng.getrandbits(4 * digits):0{digits}x}"
        return f"{rng.choice(self.words)} {rng.choice(self.words)}"

    def name(self, rng: Random, letters: int = 4) -> str:
        """A variable's name: four capital letters, or as many as `letters` says."""
        return "".join(rng.choices(NAME_LETTERS, k=letters))

    def number(self, rng: Random) -> str:
        """A variable's value: five digits."""
        return str(rng.randrange(10000, 99999))
