"""The text that haystacks are cut from: the Python sources beside the interpreter: no downloads."""

from __future__ import annotations

import re
import site
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from random import Random

SMALLEST, LARGEST = 1_500, 400_000  # bytes: shorter files are mostly imports, longer ones mostly tables
HELD_OUT_EVERY = 50


def source_roots() -> list[Path]:
    """The folders of the installed packages, and of the standard library where there are none."""
    found = [Path(root) for root in site.getsitepackages() if any(Path(root).glob("*/*.py"))]
    return found or [Path(sysconfig.get_paths()["stdlib"])]


def load_corpus(megabytes: float, roots: Sequence[Path] | None = None) -> tuple[bytes, bytes]:
    """Read up to `megabytes` million bytes of Python sources: `(training text, held-out text)`.

    Files are taken in a fixed random order; those with bytes outside ASCII are left out, and every fiftieth is held
    out. Raises ValueError when the folders hold too few sources for both parts.
    """
    folders = list(roots) if roots is not None else source_roots()
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    Random(0).shuffle(files)
    train: list[bytes] = []
    held_out: list[bytes] = []
    size = 0
    for i, path in enumerate(files):
        try:
            text = path.read_bytes()
        except OSError:  # a file that is gone or locked is one file less
            continue
        if not SMALLEST < len(text) < LARGEST or not text.isascii():
            continue
        (held_out if i % HELD_OUT_EVERY == 0 else train).append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    if not train or not held_out:
        raise ValueError(
            f"{', '.join(map(str, folders))} hold {len(files)} Python files, too few to train on; name other folders"
        )
    return b"\n\n".join(train), b"\n\n".join(held_out)


def common_words(text: bytes, limit: int = 20_000_000) -> list[str]:
    """The sorted words of 4 to 9 lower-case letters in the first `limit` bytes: what keys are made of."""
    return sorted(set(re.findall(r"\b[a-z]{4,9}\b", text[:limit].decode("ascii", "ignore"))))
