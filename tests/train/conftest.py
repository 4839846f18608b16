"""A small haystack and a folder of sources, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from saccade.train.text import Grammar


def make_words() -> list[str]:
    rng = Random(0)
    return sorted({"".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(4, 9))) for _ in range(400)})


def make_source(rng: Random, size: int) -> str:
    words = make_words()
    lines: list[str] = []
    while sum(map(len, lines)) < size:
        lines.append(f"    {rng.choice(words)} = {rng.choice(words)}({rng.choice(words)}, {rng.randrange(100)})\n")
    return "".join(lines)


@pytest.fixture(scope="session")
def grammar() -> Grammar:
    return Grammar(make_source(Random(1), 60_000).encode(), make_words())


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for i in range(60):
        (folder / f"module_{i}.py").write_text(make_source(Random(i), 2_000))
    return folder
