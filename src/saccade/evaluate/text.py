"""The text that evaluation is made of: standard-library sources shipped with the package, or a file of the user's.

The shipped text (`data/stdlib.txt`, 1 MB, see `collect`) is no part of what the pocket model was trained on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from saccade.train.text import Grammar

SHIPPED = Path(__file__).resolve().parent / "data" / "stdlib.txt"
WORD = re.compile(r"\b[a-z]{4,9}\b")
MINIMUM_BYTES = 4096
MINIMUM_WORDS = 64


@lru_cache(maxsize=1)
def shipped_text() -> bytes:
    """The text that comes with the package, ASCII."""
    return SHIPPED.read_bytes()


def words(text: bytes) -> list[str]:
    """The distinct lower-case words of 4 to 9 letters in `text`, sorted."""
    return sorted(set(WORD.findall(text.decode("utf-8", errors="ignore"))))


def read_text(path: str | Path) -> bytes:
    """The bytes of a text file of the user's. Raises ValueError if it is missing, too short or no UTF-8 text."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"the text file {path} does not exist: give the path of a UTF-8 text file")
    data = path.read_bytes()
    if len(data) < MINIMUM_BYTES:
        raise ValueError(f"the text file {path} has {len(data)} bytes: give one of at least {MINIMUM_BYTES}")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the text file {path} is not UTF-8 (byte {error.start}): convert it first") from None
    return data


@lru_cache(maxsize=4)
def grammar(path: str | Path | None = None) -> Grammar:
    """The Grammar over the shipped text, or over the file at `path`.

    Keys and values are drawn from the text's own words; where a file has too few of them, from the shipped text's.
    Raises ValueError as `read_text` does.
    """
    if path is None:
        return Grammar(shipped_text(), words(shipped_text()))
    text = read_text(path)
    found = words(text)
    return Grammar(text, found if len(found) >= MINIMUM_WORDS else words(shipped_text()))
