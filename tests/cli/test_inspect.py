"""`saccade inspect` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.evaluate.tiny import save_tiny
from typer.testing import CliRunner, Result

from saccade.cli.main import app

TEXT = "def read(path):\n    with open(path) as file:\n        return file.read()\n\n\n" * 6
SPEC = "sampleattention(alpha=0.9)"


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("SACCADE_DEBUG", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *words])


def test_a_page_a_file_and_a_table(model: str, prompt: Path, tmp_path: Path) -> None:
    page, result = tmp_path / "page.html", tmp_path / "result.json"
    words = ["--model", model, "--prompt-file", str(prompt), "--prefill", SPEC, "--length", "300", "--device", "cpu"]
    done = run(*words, "--html", str(page), "--json", str(result))
    assert done.exit_code == 0, done.output
    found = json.loads(result.read_text())
    assert found["schema"] == "saccade.inspect/1" and found["settings"]["prompt"] == "prompt.txt"
    assert found["attention"]["length"] == 300 and found["settings"]["repeats"] > 0
    assert found["command"].startswith("saccade inspect --model") and "--prefill 'sampleattention(alpha=0.9)'" in found["command"]
    assert SPEC in page.read_text() and "8 heads of" in page.read_text()
    lines = done.stdout.splitlines()
    assert "300 tokens, prompt.txt" in lines[0]
    assert lines[1].split() == ["layer", "computed", "read", "mass", "least", "mass", "sink", "retrieval"]
    assert [line.split()[0] for line in lines[2:4]] == ["0", "1"] and lines[-2:] == [f"Result: {result}", f"Page: {page}"]


def test_without_a_file_the_shipped_text_and_without_a_method_maps_and_scores(model: str, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = run("--model", model, "--length", "260", "--json", str(result), "--device", "cpu")
    assert done.exit_code == 0, done.output
    found = json.loads(result.read_text())
    assert found["settings"]["prefill"] is None and found["attention"]["length"] == 260
    assert "Question: What is the" in "".join(found["attention"]["texts"])
    assert "computed" not in done.stdout.splitlines()[1] and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt-file", "/nowhere/p.txt"], "there is no prompt file /nowhere/p.txt: give a UTF-8 text file"),
        (["--prefill", "snapkv"], "snapkv has a cache method: only what a prefill method reads can be inspected"),
        (["--prefill", "minferense"], "did you mean minference"),
        (["--length", "3"], "--length 3 is too small: give at least 8"),
        (["--length", "9000"], "9000 tokens, the model 4096 positions"),
        (["--length", "20"], "below the minimum of task needle"),
        (["--html", "/nowhere/page.html"], "the folder /nowhere does not exist"),
        (["--html", "x.html", "--json", "x.html"], "--html and --json both name x.html"),
        (["--plan", "/nowhere/plan"], "no plan at /nowhere/plan"),
        (["--device", "tpu9"], "device 'tpu9' is unknown"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(words: list[str], says: str, model: str) -> None:
    done = run("--model", model, *words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line


def test_prompt_files_that_are_none(model: str, tmp_path: Path, prompt: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe")
    assert "is empty: write a prompt into it" in run("--prompt-file", str(empty)).stderr
    assert "is not UTF-8 text (byte 0)" in run("--prompt-file", str(binary)).stderr
    longer = run("--model", model, "--prompt-file", str(prompt), "--length", "2000")
    assert longer.exit_code == 2 and f"has {len(TEXT) + 1} tokens, fewer than --length 2000" in longer.stderr
