"""`saccade generate` from the outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.evaluate.tiny import save_tiny
from typer.testing import CliRunner, Result

from saccade.cli.main import app

PROMPT = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file."


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny"))


def run(*words: str, given: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", *words], input=given)


def test_text_goes_to_stdout_and_what_ran_to_stderr(prompt: Path, model: str) -> None:
    words = ["--model", model, "--cache", "streaming-llm(window=32)", "--max-new-tokens", "12", "--device", "cpu"]
    result = run("--prompt-file", str(prompt), *words)
    assert result.exit_code == 0, result.output
    assert 1 <= len(result.stdout.rstrip("\n")) <= 12 and "import os" not in result.stdout
    lines = {line.split("  ")[0]: line for line in result.stderr.splitlines()}
    assert f"{len(PROMPT) + 1} tokens" in lines["prompt"] and "first token after" in lines["prompt"]
    assert "12 tokens" in lines["written"] and "tokens/s" in lines["written"]
    assert "100.0%" in lines["pairs read in prefill"]
    share = float(lines["pairs read in decoding"].split("%")[0].split()[-1])
    assert 30 < share < 80
    assert "of 89 tokens seen" in lines["entries held"]
    again = run("--prompt-file", "-", *words, given=PROMPT)
    assert again.stdout == result.stdout, "greedy, and the same from stdin"


def test_steps_that_are_not_recorded_are_counted_and_told(prompt: Path, model: str) -> None:
    with pytest.warns(UserWarning, match="steps are not recorded: the model is on cpu"):
        result = run("--prompt-file", str(prompt), "--model", model, "--max-new-tokens", "5", "--device", "cpu", "--graph", "8")
    assert result.exit_code == 0 and "0 replayed, 0 recorded, 4 plain" in result.stderr


def test_dense_is_what_no_method_means(prompt: Path, model: str) -> None:
    result = run("--prompt-file", str(prompt), "--model", model, "--max-new-tokens", "4", "--device", "cpu")
    assert result.exit_code == 0, result.output
    decoding = next(line for line in result.stderr.splitlines() if line.startswith("pairs read in decoding"))
    assert "100.0%" in decoding


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt-file", "/nowhere/p.txt"], "there is no prompt file /nowhere/p.txt"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 asks for nothing"),
        (["--cache", "quest"], "quest is a decode method: give it as --decode"),
        (["--cache", "snapvk"], "did you mean snapkv"),
        (["--decode", "loki", "--device", "cpu"], "loki needs a calibration plan"),
        (["--plan", "/nowhere/p"], "no plan at /nowhere/p"),
        (["--model", "./nowhere"], "there is no folder ./nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(prompt: Path, words: list[str], says: str) -> None:
    given = words if "--prompt-file" in words else ["--prompt-file", str(prompt), *words]
    result = run(*given)
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and says in line


def test_empty_and_binary_prompts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b" \n")
    assert "the prompt is empty" in run("--prompt-file", str(path)).stderr
    path.write_bytes(b"\xff\xfe\xfd")
    assert "is not UTF-8 text" in run("--prompt-file", str(path)).stderr
