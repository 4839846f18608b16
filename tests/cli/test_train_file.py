"""`saccade train RECIPE.yaml` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.train.runs import TINY
from typer.testing import CliRunner, Result

from saccade.cli.main import app


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *words])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, "steps": 6, "checkpoint": 2}))
    return path


def test_a_file_is_trained(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run(str(recipe), "--out", str(out), "--device", "cpu")
    assert result.exit_code == 0, result.output
    told = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert Path(told["model"]) == out / "weights" and Path(told["curve"]).read_text().startswith("<!doctype html>")
    assert told["evaluation"].startswith("loss 3.") and "accuracy 0." in told["evaluation"]
    longer = run(str(recipe), "--out", str(out), "--steps", "8")
    assert longer.exit_code == 0 and len((out / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(("words", "message"), [
    (["pocke", "--out", "x"], "there is no recipe 'pocke': did you mean pocket"),
    (["none.yaml", "--out", "x"], "the recipe none.yaml does not exist: give the path of a YAML file"),
    (["{recipe}", "--out", "x", "--rate", "1"], "--rate can't be given with a recipe file: write it into"),
    (["{recipe}", "--out", "x", "--steps", "3", "--seconds", "20"], "give one of them"),
    (["{recipe}", "--out", "{recipe}"], "tiny.yaml is a file: give a folder for the run"),
    (["{recipe}", "--out", "nowhere/at/all"], "the folder nowhere/at does not exist"),
    (["tiny", "--out", "x", "--device", "cpu"], "--device is for recipe files"),
])  # fmt: skip
def test_mistakes_are_said_in_a_line(recipe: Path, words: list[str], message: str) -> None:
    result = run(*(word.replace("{recipe}", str(recipe)) for word in words))
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr


def test_a_mistake_in_the_file_names_its_key(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("model: pocket\ndata: {set: bytes, folder: .}\nsteps: 3\noptimiser: {name: muon}\n")
    result = run(str(path), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2 and "wrong.yaml has no key 'optimiser': did you mean optimizer?" in result.stderr
    assert not (tmp_path / "run").exists()
