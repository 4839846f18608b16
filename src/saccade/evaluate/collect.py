"""How `data/stdlib.txt` was made: plain ASCII modules of a Python standard library, chosen by name alone."""

from __future__ import annotations

import sysconfig
from pathlib import Path

SEPARATOR = b"\n\n"


def collect(folder: str | Path | None = None, every: int = 3, limit: int = 1_000_000) -> bytes:
    """Text of every `every`-th eligible top-level module of a standard library, sorted by name.

    Eligible: a public name, 1.5 to 100 kB, ASCII only, no line above 120 bytes. Modules are added whole until the
    text has passed `limit` bytes. The same interpreter release gives the same bytes on every machine.

    Args:
        folder: the standard library's folder; default: this interpreter's.
        every: keep one module of this many.
        limit: bytes after which no further module is added.

    Raises:
        ValueError: no module of the folder is eligible.
    """
    root = Path(folder if folder is not None else sysconfig.get_paths()["stdlib"])
    eligible = []
    for path in sorted(root.glob("*.py"), key=lambda p: p.name):
        if path.name.startswith("_"):  # private modules hold generated tables and build paths
            continue
        data = path.read_bytes().replace(b"\r\n", b"\n")
        if 1500 < len(data) < 100_000 and max(data) < 127 and max(map(len, data.split(b"\n"))) <= 120:
            eligible.append(data)
    chosen, size = [], 0
    for data in eligible[::every]:
        if size > limit:
            break
        chosen.append(data)
        size += len(data) + len(SEPARATOR)
    if not chosen:
        raise ValueError(f"no plain ASCII Python module was found in {root}; pass the folder of a standard library")
    return SEPARATOR.join(chosen)
