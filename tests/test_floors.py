"""A room of the house imports only from rooms below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "saccade"
FLOORS = ("core", "ops", "parts", "cache", "methods", "attach", "models", "train", "evaluate", "bench", "report", "cli")


def imported(tree: ast.AST) -> set[str]:
    """Rooms that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("saccade.")}
    return found & set(FLOORS)


@pytest.mark.parametrize("room", FLOORS)
def test_nothing_is_imported_from_above(room: str) -> None:
    above = set(FLOORS[FLOORS.index(room) + 1 :])
    wrong = {}
    for path in sorted((SOURCE / room).rglob("*.py")):
        up = imported(ast.parse(path.read_text())) & above
        if up:
            wrong[str(path.relative_to(SOURCE))] = up
    assert not wrong


def test_files_are_short() -> None:
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long
