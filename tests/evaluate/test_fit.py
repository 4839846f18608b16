"""`saccade fit`: bytes from real cache layers, checked against an attached model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.contract.models import tiny
from typer.testing import CliRunner

import saccade
from saccade.cli.main import app
from saccade.evaluate import fit as fitting
from saccade.evaluate.contenders import contender


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("spec", ["snapkv(budget=0.25)", "zipcache", "streaming-llm(sinks=2, window=100)", "snapkv(budget=0.5)|zipcache"])
def test_bytes_are_those_of_an_attached_model(folder: Path, spec: str) -> None:
    shape, _ = fitting.shape_of(str(folder), dtype="float32")
    model, n = tiny("llama"), 700
    with saccade.attach(model, cache=spec) as handle, torch.no_grad():
        cache = model(torch.randint(3, 60, (1, n)), use_cache=True).past_key_values
        handle.compress()
        own = handle.stats()
    assert cache is not None
    assert sum(fitting.measured_bytes(shape, contender(spec), n)) == pytest.approx(own.kv_bytes + own.index_bytes, rel=0.02)


def test_what_it_says_fits_does_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory in which the line allows some hundred tokens: the bytes measured there fill it, and not more."""
    monkeypatch.setattr(fitting, "SIZES", (256, 384, 512))
    shape, model = fitting.shape_of(str(folder), dtype="float32")
    memory = shape.weights + 700_000
    result = fitting.fit(shape, model, ["snapkv(budget=0.5)", "quest", "nonsense"], memory=memory, lengths=[256], reserve=0.0)
    rows = {row["method"]: row for row in result["rows"]}
    dense, half, quest = rows["dense"], rows["snapkv(budget=0.5)"], rows["quest"]
    assert dense["context"] == 700_000 // (2 * shape.token_bytes) and dense["batch"]["256"] == 700_000 // (2 * 256 * shape.token_bytes)
    assert rows["nonsense"]["status"] == "failed" and "no method" in rows["nonsense"]["error"]
    assert quest["context"] < dense["context"] < half["context"] and 0.5 < half["share"] < 0.7
    n = half["context"]
    held = fitting.measured_bytes(shape, contender("snapkv(budget=0.5)"), n)
    # while the last layer is compressed it is whole
    assert 0.9 * 700_000 < held[0] + n * shape.token_bytes < 1.05 * 700_000
    assert half["straight"]


def test_the_command_and_its_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SIZES", (64, 96, 128))
    run = CliRunner().invoke
    out = tmp_path / "fit.json"
    words = ["fit", "--model", str(folder), "--memory", "1MiB", "--methods", "snapkv(budget=0.25);zipcache", "--lengths", "1K"]
    words += ["--json", str(out)]
    result = run(app, words)
    assert result.exit_code == 0 and "batch at 1K" in result.stdout and "4096 positions" in result.stdout.replace(",", "")
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["dense", "snapkv(budget=0.25)", "zipcache"]
    for change, message in (
        (("--memory", "much"), "memory 'much' is no size"), (("--methods", "snapvk"), "did you mean snapkv"),
        (("--reserve", "2"), "--reserve 2.0 is not a share"), (("--model", "/nowhere/at/all"), "can't be read"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
    ):  # fmt: skip
        broken = list(words)
        if change[0] in broken:
            broken[broken.index(change[0]) + 1] = change[1]
        else:
            broken += change
        failed = run(app, broken)
        assert failed.exit_code == 2 and message in failed.stderr and "Traceback" not in failed.stderr


def test_sizes_are_read_and_written() -> None:
    assert [fitting.parse_memory(text) for text in ("24GiB", "80 GB", "512mib", "1e3")] == [24 << 30, 80 * 10**9, 512 << 20, 1000]
    assert [fitting.size_text(n) for n in (12, 2048, 3 << 30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
