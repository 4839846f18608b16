"""`saccade study recall`: contestants that are known to win and to lose, the table, the page, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from saccade.cli.main import app
from saccade.evaluate.study_recall import CONTESTANTS, RecallSettings, describe, parse_contestant, recipe_for, run_study, table_rows
from saccade.train.models import build_model

SMALL = [
    "--depth", "2", "--dim", "16", "--length", "32", "--pairs", "4", "--fewest", "2", "--vocab", "32", "--batch", "8", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["study", *words])


def test_the_table_and_what_is_written(tmp_path: Path) -> None:
    words = ["recall", "--out", str(tmp_path), "-l", "llama", "-l", "softmax,lightning-attention", *SMALL, "--steps", "8"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "study.json").read_text())
    assert found["schema"] == "saccade.study-recall/1" and [row["contestant"] for row in found["rows"]] == words[4:7:2]
    for row in found["rows"]:
        assert row["steps"] == 8 and 0 <= row["accuracy"] < 0.5 and len(row["curve"]) == 8 and row["solved_at"] is None
        assert f"{row['accuracy']:.3f}" in result.stdout and row["contestant"] in result.stdout
    assert found["rows"][1]["layers"] == ["softmax", "lightning-attention"]
    page = (tmp_path / "study.html").read_text()
    assert "Associative recall: 4 pairs in 32 tokens" in page and page.count("<title>") == 3 and "softmax,lightning-attention" in page
    again = run(*words)  # goes on where it stopped: at the end
    assert again.exit_code == 0 and json.loads((tmp_path / "study.json").read_text())["rows"] == found["rows"]


def test_all_contestants_see_the_same_data() -> None:
    settings = RecallSettings()
    recipes = [recipe_for(name, settings) for name in ("softmax", "deltanet*3,softmax")]
    assert recipes[0].data == recipes[1].data and recipes[0].optimizer == recipes[1].optimizer and recipes[0].seed == recipes[1].seed
    assert recipes[0].data["pairs"] == 32 and recipes[0].data["length"] == 256 and recipes[0].evaluate.data == {"fewest": 32}


def test_contestants() -> None:
    assert parse_contestant("deltanet*3,softmax", 8) == (["deltanet"] * 3 + ["softmax"]) * 2
    assert parse_contestant("softmax(window=8, sinks=1)*2 , deltanet", 3) == ["softmax(window=8, sinks=1)"] * 2 + ["deltanet"]
    for name in CONTESTANTS:
        assert len(parse_contestant(name, 4)) == 4
    model = build_model(describe("deltanet*3,softmax", RecallSettings(dim=32)), 40)
    assert model.config.hidden_size == 32 and model.config.vocab_size == 40 and model.config.num_hidden_layers == 4


@pytest.mark.parametrize(("words", "message"), [
    (["-l", "softmx"], "the contestant 'softmx' can't be built: model: there is no method 'softmx': did you mean softmax"),
    (["-l", "softmax*3"], "lists 3 layers, which do not repeat evenly to a depth of 2"),
    (["-l", "softmax", "--pairs", "9"], "9 pairs and their queries take 36 tokens"),
    (["-l", "softmax", "--heads", "3"], "num_attention_heads=3"),
    (["-l", " "], "lists 0 layers"),
])  # fmt: skip
def test_mistakes_are_said_in_a_line(tmp_path: Path, words: list[str], message: str) -> None:
    result = run("recall", "--out", str(tmp_path / "study"), *SMALL, *words)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and message in result.stderr
    assert not (tmp_path / "study").exists()


def test_a_hybrid_study(tmp_path: Path) -> None:
    small = [
        "--depth", "2", "--dim", "8", "--heads", "1", "--length", "16", "--pairs", "2", "--vocab", "8", "--batch", "2", "--steps", "2",
        "--text-steps", "1", "--device", "cpu",
    ]  # fmt: skip
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.md").write_text("a line of text\n" * 20)
    words = ["hybrid", "-o", str(tmp_path / "out"), "--mixers", "deltanet, hgrn", "--ratios", "pure,1:1", "--text", str(tmp_path / "text")]
    cut = run(*words, *small, "--seconds", "0")
    assert cut.exit_code == 0 and "missing, for the time was up: softmax: recall, softmax: text, deltanet 0 of 2: recall" in cut.stdout
    done = run(*words, *small)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "study.json").read_text())
    assert len(found["rows"]) == 5 and not found["missing"] and found["settings"]["folder"] == str(tmp_path / "text")
    assert "pure (0)" in done.stdout and "softmax (2)" in done.stdout and "bits per byte" in done.stdout
    assert f"{found['rows'][0]['text']['bits']:.3f}" in done.stdout and "hgrn 1 of 2: text: accuracy" in done.stderr
    assert "<h1>Hybrids of linear attention and softmax</h1>" in (tmp_path / "out" / "study.html").read_text()
    other = run(*words, *small, "--steps", "3")
    assert other.exit_code == 2 and "was made with steps 2, but 3 was given now" in other.stderr


def test_a_failed_contestant_is_told_at_the_end(tmp_path: Path) -> None:
    result = run("recall", "-o", str(tmp_path), "-l", "softmax", *SMALL, "--steps", "4", "--rate", "1e30")
    assert result.exit_code == 1 and "failed: softmax: at step" in result.stdout and "lower optimizer.rate" in result.stderr


@pytest.mark.slow
def test_the_delta_rule_recalls_what_a_sum_does_not(tmp_path: Path) -> None:
    settings = RecallSettings(depth=2, steps=800, evaluations=16, samples=2)
    found = run_study(["deltanet", "lightning-attention"], settings, tmp_path, "cpu")
    share = {row["contestant"]: row["accuracy"] for row in found["rows"]}
    assert share["deltanet"] > 0.85 and share["deltanet"] > share["lightning-attention"] + 0.4
    assert table_rows(found)[0][0] == "deltanet"
