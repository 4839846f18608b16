"""Where the commands write."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console

# wide enough for every row of `saccade list` on one line
_PIPE_WIDTH = 320


def console(stderr: bool = False) -> Console:
    """A rich console on stdout (or stderr). In a pipe or a file lines are not folded, so that grep and head work."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if _folds(stream) else _PIPE_WIDTH)


def write(renderable: Any) -> None:
    """Print a table or a page on stdout; without the padding at line ends, which only a terminal needs."""
    out = console()
    with out.capture() as text:
        out.print(renderable)
    for line in text.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def write_json(document: object) -> None:
    """Write a document as JSON on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def _folds(stream: Any) -> bool:
    return stream.isatty() or "COLUMNS" in os.environ
