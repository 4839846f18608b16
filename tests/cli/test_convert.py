"""`saccade convert`: the comparison, what is left in the folder, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from saccade.cli.main import app
from saccade.models.pocket import path as pocket_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained model with the pocket model's tokenizer, and a text."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket_path(), local_files_only=True).save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(f"some words of text in line number {i} of the file" for i in range(400)))
    return folder


def run(model: Path, *words: str) -> Result:
    given = ["convert", "--model", str(model), "--data", str(model / "text.txt"), "--device", "cpu", *words]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, given)


def test_the_table_the_report_and_the_model(model: Path, tmp_path: Path):
    words = ["--to", "lolcats(window=8)", "--layers", "1:1", "-o", str(tmp_path / "out"), "--transfer", "2", "--tune", "2", "--batch", "2"]
    words += ["--context", "128", "--length", "256", "--samples", "1"]
    result = run(model, *words)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["rows"]) == ["before", "untaught", "after"]
    for name, row in report["rows"].items():
        assert 7 < row["bits"] < 10 and row["needle"] == 0 and row["decode_ms"] > 0 and row["state_bytes"] > 0
        assert name in result.stdout and f"{row['bits']:.3f}" in result.stdout and f"{row['state_bytes']:,}" in result.stdout
    assert report["rows"]["after"]["bits"] != report["rows"]["untaught"]["bits"]
    assert [spec.partition("(")[0] for spec in report["layers"]] == ["lolcats", "softmax"]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "weights")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "weights")
    assert opened(**tokenizer("text", return_tensors="pt", return_token_type_ids=False)).logits.shape[-1] == 320


def test_layers_are_chosen_and_named(model: Path, tmp_path: Path):
    words = ["--to", "minicpm-sala(dense=64, local=32, block=16, top=5, stride=8, window=8)", "-o", str(tmp_path / "out")]
    words += ["--layers", "select:2", "--transfer", "2", "--tune", "1", "--batch", "2", "--context", "64", "--length", "256"]
    words += ["--samples", "1"]
    result = run(model, *words)
    assert result.exit_code == 0, result.output
    assert "layers that stay: 0, 1 (measured in" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all("sparse=True" in spec for spec in report["layers"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "lolcat"], "there is no method 'lolcat'"), (["--to", "snapkv"], "is no mixer"),
        (["--to", "lolcats", "--batch", "3", "--rows", "2"], "can't be run 2 at a time"),
        (["--to", "lolcats", "--layers", "odd"], "pattern 'odd' is not known"),
        (["--to", "minicpm-sala", "--layers", "select:9"], "give from 2 to 2"),
        (["--to", "lolcats", "--context", "4096"], "too few for sequences of 4096 tokens"),
    ],
)  # fmt: skip
def test_what_can_not_be_is_refused(model: Path, tmp_path: Path, words: list[str], message: str):
    result = run(model, "-o", str(tmp_path / "out"), *words)
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()


def test_an_output_folder_that_can_not_be(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    assert "is a file" in run(model, "--to", "lolcats", "-o", str(tmp_path / "file")).output
    assert "does not exist" in run(model, "--to", "lolcats", "-o", str(tmp_path / "no" / "out")).output
    (tmp_path / "out").mkdir()
    allowed, closed = os.access, (tmp_path, tmp_path / "out")
    monkeypatch.setattr(os, "access", lambda path, mode, **given: not (mode == os.W_OK and Path(path) in closed) and allowed(path, mode))
    for place in ("out", "new"):
        # before anything is loaded or scored
        monkeypatch.setattr("saccade.evaluate.loading.load_model", None)
        result = run(model, "--to", "lolcats", "-o", str(tmp_path / place))
        assert result.exit_code == 2 and "is not writable" in result.output and "Traceback" not in result.output
