"""`saccade compare` from the outside: a small run, and one sentence for everything that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.tiny import save_tiny
from typer.testing import CliRunner, Result

from saccade.cli.compare import parse_lengths, table
from saccade.cli.main import app
from saccade.evaluate import cells, runner
from saccade.evaluate.contenders import split_methods


def run(*words: str, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["compare", *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, Path]:
    folder = tmp_path_factory.mktemp("compare")
    data, page = folder / "result.json", folder / "page.html"
    return run(*words(save_tiny(folder / "tiny")), "--json", str(data), "--html", str(page)), data, page


def words(model: Path) -> list[str]:
    """A small run on a model in a folder."""
    methods = "streaming-llm(window=60);snapkv(budget=0.5)"
    run_on = ["--model", str(model), "--device", "cpu"]
    return [*run_on, "--methods", methods, "--tasks", "needle", "--lengths", "260", "--samples", "1"]


def test_a_run_prints_a_table_and_writes_result_and_page(done: tuple[Result, Path, Path]) -> None:
    result, data, page = done
    assert result.exit_code == 0, result.output
    rows = json.loads(data.read_text())["rows"]
    assert [row["slug"] for row in rows] == ["dense", "random", "streaming-llm", "snapkv"]
    for row in rows:
        assert row["status"] == "ok" and row["command"].endswith("--seed 0 --device cpu")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("needle  260 tokens, aware") for line in lines)
    shown = next(line for line in lines if line.startswith("snapkv(budget=0.5)"))
    assert " 50%" in shown and "1.00/0." in shown and "ms" in shown
    assert f"Result: {data}" in lines and f"Page: {page}" in lines
    assert "snapkv(budget=0.5)" in page.read_text() and "<html" in page.read_text()


def test_a_finished_run_resumes_to_nothing(done: tuple[Result, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a sample ran")

    monkeypatch.setattr(cells, "run_sample", never)
    same = words(done[1].parent / "tiny")
    again = run(*same, "--json", str(done[1]), "--resume")
    assert again.exit_code == 0, again.output
    other = run(*same[:-1], "2", "--json", str(done[1]), "--resume")
    assert other.exit_code == 2 and "samples 1 (now 2)" in other.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"

    def interrupted(*args: Any, **kwargs: Any) -> None:
        path.write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "compare", interrupted)
    result = run("--methods", "random", "--json", str(path), "--device", "cpu", columns=200)
    assert result.exit_code == 130
    assert "--resume goes on" in result.stderr and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--methods", "snapvk"], "did you mean snapkv"),
        (["--methods", "snapkv(budgett=1)"], "did you mean budget"),
        (["--methods", ";"], "no methods were given"),
        (["--methods", "snapkv+h2o"], "two cache methods"),
        (["--methods", "snapkv", "--tasks", "nedle"], "there is no task 'nedle': did you mean needle"),
        (["--methods", "snapkv", "--tasks", ","], "nothing to run"),
        (["--methods", "snapkv", "--lengths", "many"], "'many' is no length"),
        (["--methods", "snapkv", "--lengths", "64", "--device", "cpu"], "length 64 is below the minimum of task needle"),
        (["--methods", "snapkv", "--samples", "0"], "samples must be a whole number of at least 1"),
        (["--methods", "snapkv", "--mode", "blind"], "mode 'blind' is unknown"),
        (["--methods", "snapkv", "--json", "/nowhere/r.json"], "the folder /nowhere does not exist"),
        (["--methods", "snapkv", "--html", "/nowhere/r.html"], "the folder /nowhere does not exist"),
        (["--methods", "snapkv", "--json", "/tmp/r", "--html", "/tmp/r"], "both name /tmp/r"),
        (["--methods", "snapkv", "--resume"], "--resume needs the file"),
        (["--methods", "snapkv", "--plan", "/nowhere/p.safetensors"], "no plan at /nowhere/p.safetensors"),
        (["--methods", "snapkv", "--model", "./nowhere"], "there is no folder ./nowhere"),
        (["--methods", "snapkv", "--model", "a/b", "--offline"], "can't be loaded from the local cache"),
        (["--methods", "snapkv", "--text", "/nowhere/t.txt", "--device", "cpu"], "/nowhere/t.txt does not exist"),
        (["--methods", "snapkv", "--dtype", "int4"], "dtype 'int4' is unknown"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: list[str], says: str) -> None:
    result = run(*given, columns=400)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line
    assert result.stdout == ""


def test_lengths_and_methods_are_read_leniently() -> None:
    assert parse_lengths(" 1024, 4K,2k ") == [1024, 4096, 2048]
    assert split_methods("dense, snapkv(budget=0.25, window=16);quest+h2o;") == [
        "dense", "snapkv(budget=0.25, window=16)", "quest+h2o",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'-4' is no length"):
        parse_lengths("-4")


def test_failures_and_bits_have_their_lines(done: tuple[Result, Path, Path]) -> None:
    from rich.console import Console

    result = json.loads(done[1].read_text())
    result["rows"][2] |= {"status": "failed", "error": "ValueError: it broke [here]", "score": None}
    for row in result["rows"]:
        row["discriminating"] = False
    result["rows"].append({**result["rows"][0], "task": "text", "unit": "bits", "score": 0.7, "low": 0.6, "high": 0.8})
    out = Console(width=100)
    with out.capture() as text:
        out.print(table(result, 100))
    shown = text.get()
    assert "streaming-llm(window=60) failed: ValueError: it broke [here]" in shown
    assert "dense itself does not solve it" in shown and "bits per byte, lower is better" in shown
    assert "0.700" in shown and "peak" not in shown
    wide = Console(width=140)
    with wide.capture() as text:
        wide.print(table(result, 140))
    assert "peak" in text.get()
