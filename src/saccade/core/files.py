"""Writing files so that nothing is ever half-written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: str | Path) -> Path:
    """Raise ValueError, in one sentence, if a file can't be written at `path`; return it as a Path."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a file name inside it")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist: create it, or write {path.name} elsewhere")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not writable: choose another place or change its permissions")
    return path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the name `path` when the block ends well, and goes when it doesn't."""
    path = check_writable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
