"""`saccade fit`: bytes from real cache layers, checked against an attached model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.contract.harness import untrained_plan
from tests.contract.models import tiny
from typer.testing import CliRunner

import saccade
from saccade.cli.fit import table
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
    held = fitting.measured_bytes(shape, contender(spec), n)
    assert sum(layer.device for layer in held) == pytest.approx(own.kv_bytes + own.index_bytes, rel=0.02)


@pytest.mark.slow
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
    assert 0.9 * 700_000 < held[0].device + n * shape.token_bytes < 1.05 * 700_000
    assert half["straight"]


HALVES = "infllm(n_local=64, n_init=4, chunk=32, block=16, blocks=4, cached=4)"


@pytest.mark.parametrize("spec", [
    HALVES, "ltri-llm(n_local=64, n_init=4, chunk=32, stretch=64, longest=16, budget=64)", "squeezed-attention(window=16)",
    "duoattention(share=0.5, sinks=4, recent=32, block=16)", "spatten", "gemfilter(budget=0.25)",
])  # fmt: skip
def test_methods_that_read_the_prompt_and_hold_it_too_are_measured_as_they_are(folder: Path, spec: str) -> None:
    """What they hold after a prompt and one step, beside what an attached model holds; host memory apart."""
    shape, _ = fitting.shape_of(str(folder), dtype="float32")
    model, n = tiny("llama"), 500
    one = contender(spec)
    plans = [untrained_plan(model, one.methods["cache"])] if "duoattention" in spec else []
    methods: Any = one.methods
    with saccade.attach(model, **methods, plan=plans) as handle, torch.no_grad():
        cache = model(torch.randint(3, 60, (1, n)), use_cache=True).past_key_values
        if "decode" in methods:
            handle.compress()
            model(torch.randint(3, 60, (1, 1)), past_key_values=cache)
        own = handle.stats()
    held = fitting.measured_bytes(shape, one, n, plans)
    # random keys are not the model's, and where ltri-llm cuts its spans depends on them
    assert sum(layer.device for layer in held) == pytest.approx(own.kv_bytes + own.index_bytes, rel=0.3 if one.slug == "ltri-llm" else 0.05)
    assert sum(layer.host for layer in held) == pytest.approx(own.host_bytes, rel=0.05)
    dense = n * shape.token_bytes * shape.layers
    if one.slug in ("infllm", "ltri-llm"):
        assert own.host_bytes > 0.5 * dense
    if one.slug == "gemfilter":
        assert own.kv_bytes < 0.4 * dense  # a quarter, and room for the next tokens


@pytest.mark.slow
def test_host_memory_has_a_column_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SIZES", (192, 256, 320))
    shape, model = fitting.shape_of(str(folder), dtype="float32")
    result = fitting.fit(shape, model, [HALVES, "snapkv(budget=0.5)"], memory=shape.weights + 700_000, lengths=[256], reserve=0.0)
    rows = {row["method"].partition("(")[0]: row for row in result["rows"]}
    token = shape.layers * shape.token_bytes
    assert rows["infllm"]["host_token_bytes"] == pytest.approx(token, rel=0.1), "what does not stay goes to the host"
    assert rows["dense"]["host_token_bytes"] == rows["snapkv"]["host_token_bytes"] == 0
    console = Console(width=120, record=True, file=StringIO())
    console.print(table(result))
    shown = console.export_text()
    assert "host, a token" in shown and next(line for line in shown.splitlines() if line.startswith("snapkv")).count(" - ") == 1
    console.print(table({**result, "rows": [rows["dense"], rows["snapkv"]]}))
    assert "host, a token" not in console.export_text()
    short = fitting.fit(shape, model, [HALVES.replace("64", "400")], memory=1 << 22, lengths=[256], sizes=[64, 96, 128])
    assert short["rows"][1]["idle"] and not rows["infllm"]["idle"] and not rows["dense"]["idle"]
    console.print(table(short))
    assert "nothing was dropped at these sizes" in console.export_text()


def test_the_command_and_its_mistakes(folder: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = tmp_path / "fit.json"
    words = ["fit", "--model", str(folder), "--memory", "1MiB", "--methods", "snapkv(budget=0.25);zipcache", "--lengths", "1K"]
    words += ["--sizes", "64,96,128"]
    words += ["--json", str(out)]
    result = run(app, words)
    assert result.exit_code == 0 and "batch at 1K" in result.stdout and "4096 positions" in result.stdout.replace(",", "")
    assert [row["method"] for row in json.loads(out.read_text())["rows"]] == ["dense", "snapkv(budget=0.25)", "zipcache"]
    for change, message in (
        (("--memory", "much"), "memory 'much' is no size"), (("--methods", "snapvk"), "did you mean snapkv"),
        (("--reserve", "2"), "--reserve 2.0 is not a share"), (("--model", "/nowhere/at/all"), "can't be read"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"), (("--sizes", "4K,2K,1K"), "three growing sizes, not at 4096, 2048, 1024"),
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
