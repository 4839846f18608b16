"""`saccade table` from the outside: a small table, its files, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from tests.evaluate.tiny import save_tiny
from typer.testing import CliRunner, Result

from saccade.cli.main import app

SMALL = ["--methods", "fna,sampleattention", "--budgets", "0.4", "--lengths", "300", "--samples", "1", "--tasks", "needle,text"]


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["table", *words])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("table") / "tiny")


def test_a_table_is_printed_and_written_and_goes_on(model: Path, tmp_path: Path) -> None:
    data, page = tmp_path / "table.json", tmp_path / "table.md"
    words = ["prefill", "--model", str(model), "--device", "cpu", *SMALL, "--json", str(data), "--markdown", str(page)]
    result = run(*words)
    assert result.exit_code == 0, result.output
    document = json.loads(data.read_text())
    rows = document["rows"]
    # the command of the file asks for what was asked for
    assert all(word in shlex.split(document["command"]) for word in SMALL)
    assert [row["system"] for row in rows if row["aim"] and row["task"] == "needle"] == ["sampleattention", "fna"]
    lines = result.stdout.splitlines()
    assert "300 tokens" in lines and any(line.startswith("fna(window=68)") and " 0." in line for line in lines)
    assert "missing: nothing" in lines and f"Result: {data}" in lines and f"Tables: {page}" in lines
    text = page.read_text()
    assert text.startswith("# Prefill: quality at equal density") and "| `fna(window=68)` | 0." in text
    assert "## Errors of the attention output" in text and "## Failed\n\nNothing." in text
    header = next(line for line in text.splitlines() if line.startswith("| method | density"))
    assert header == "| method | density | needle | text | ms a prompt |"
    before = [row["prefill_ms"] for row in rows]
    again = run(*words, "--resume")
    assert again.exit_code == 0 and [row["prefill_ms"] for row in json.loads(data.read_text())["rows"]] == before


@pytest.mark.parametrize(("words", "says"), [
    (["speed"], "there is no table 'speed': choose prefill or cache"), (["cache", "--budgets", "0.3"], "no budgets 0.3: choose among"),
    (["cache", "--methods", "snapvk"], "no methods snapvk"), (["prefill", "--seconds", "-1"], "seconds=-1.0 is no time"),
    (["prefill", "--tasks", "copy"], "task copy is not scored by exact match"), (["prefill", "--resume"], "--resume needs the file"),
    (["prefill", "--lengths", "4X"], "'4X' is no length"), (["prefill", "--json", "/nowhere/x.json"], "/nowhere"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_sentence(words: list[str], says: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and says in result.stderr and "Traceback" not in result.stderr
