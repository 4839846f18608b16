"""docs/compare-schema.md names every key that small runs write, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tiny import tiny

from saccade.evaluate import cells
from saccade.evaluate.runner import compare
from saccade.evaluate.tables import run_table

LENGTH = 260
TEXT = (Path(__file__).parents[2] / "docs" / "compare-schema.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)}


def listed(section: str) -> set[str]:
    """The keys in the first column of a section's tables."""
    lines = [line.split(" | ")[0] for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    return {name for line in lines for name in re.findall(r"`(\w+)`", line)}


def named(section: str) -> set[str]:
    """The keys that a section names anywhere."""
    return set(re.findall(r"`(\w+)`", SECTIONS[section]))


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "PICTURE_LENGTH", 256)
        return compare(*tiny(), ["snapkv(budget=0.5)"], tasks=["needle"], lengths=[LENGTH], samples=1, batches=[1], steps=2, name="tiny")


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    chosen: dict[str, Any] = {"tasks": ["needle"], "modes": ["aware"], "systems": ["snapkv"], "aims": ["0.5"]}
    return run_table("cache", *tiny(), lengths=[LENGTH], samples=1, name="tiny", **chosen)


def test_every_key_of_a_comparison_is_named(compared: dict[str, Any], table: dict[str, Any]) -> None:
    assert listed("Top level") == set(compared) | set(table)
    rows = [*compared["rows"], *table["rows"]]
    assert len(rows) > 4 and all(row["status"] == "ok" for row in rows)
    for row in compared["rows"]:
        assert set(row) == listed("A row")
    assert {key for line in compared["throughput"] for key in line} == listed("`throughput`")
    for part in ("environment", "model", "settings"):
        assert set(compared[part]) <= named("Top level"), part


def test_every_key_of_a_table_is_named(table: dict[str, Any]) -> None:
    own = {key for row in table["rows"] for key in row} - listed("A row")
    assert own and own | set(table["table"]) == listed("Tables")
    assert set(table["settings"]) <= named("Top level") | named("Tables")


def test_every_key_of_the_maps_is_named(compared: dict[str, Any]) -> None:
    attention = compared["attention"]
    assert set(attention) | set(attention["layers"][0]["heads"][0]) <= named("`attention`")
    assert set(attention["layers"][0]) <= named("`attention`")
