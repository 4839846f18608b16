"""The metrics file: a JSON row a line, appended as training goes, cut back to the checkpoint when it resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from saccade.core.files import atomic_write

FILE = "metrics.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, none where there is no file. A torn line, as a killed process leaves at the end, is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows after `step`, and torn lines: they will be written again."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
