"""Decoding speed against the batch size: what is timed, what memory does, and what goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.tiny import TOKEN_BYTES, save_tiny, tiny
from typer.testing import CliRunner

from saccade.cli.main import app
from saccade.evaluate import throughput
from saccade.evaluate.runner import compare

LENGTH = 200


def measured(methods: list[str], batches: list[int], **changes: Any) -> dict[str, Any]:
    return compare(*tiny(), methods, **{"tasks": [], "lengths": [LENGTH], "batches": batches, "steps": 3, "floor": False, **changes})


def test_every_method_is_timed_at_every_batch() -> None:
    result = measured(["snapkv(budget=0.5)", "quest(budget=64, dense_layers=0)"], [4, 1])
    assert result["rows"] == [] and result["attention"] is None and result["settings"]["batches"] == [1, 4]
    rows = result["throughput"]
    assert [(row["slug"], row["batch"]) for row in rows] == [(slug, n) for slug in ("dense", "snapkv", "quest") for n in (1, 4)]
    for row in rows:
        assert row["status"] == "ok" and row["steps"] == 3
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert row["step_ms_low"] <= row["step_ms"] <= row["step_ms_high"] and row["prefill_ms"] > 0
        share = {"dense": 1.0, "snapkv": 0.5}.get(row["slug"])
        if share is not None:
            assert row["kv_bytes"] == share * row["batch"] * LENGTH * TOKEN_BYTES
    assert rows[0]["speedup"] == rows[1]["speedup"] == 1.0
    assert rows[3]["speedup"] == pytest.approx(rows[3]["tokens_per_second"] / rows[1]["tokens_per_second"])
    assert rows[5]["decode_density"] < 0.6 and rows[5]["index_bytes"] > 0


@pytest.mark.parametrize("problem", [
    torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_full_memory_ends_a_method_and_not_the_run(problem: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = throughput._run, []

    def limited(spot: Any, contender: Any, length: int, batch: int, steps: int) -> dict[str, Any]:
        tried.append((contender.slug, batch))
        if contender.dense and batch > 1:
            raise problem
        return real(spot, contender, length, batch, steps)

    monkeypatch.setattr(throughput, "_run", limited)
    rows = measured(["snapkv(budget=0.5)"], [1, 2, 3])["throughput"]
    assert [row["status"] for row in rows] == ["ok", "full", "full", "ok", "ok", "ok"]
    assert tried == [("dense", 1), ("dense", 2), ("snapkv", 1), ("snapkv", 2), ("snapkv", 3)]
    assert rows[1]["error"] == "out of memory" and rows[2]["error"] == "out of memory in a smaller batch"
    assert rows[4]["speedup"] is None and rows[3]["speedup"] is not None


def test_another_failure_is_told_and_tried_again(broken: str, tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    rows = measured([broken, "snapkv(budget=0.5)"], [1, 2], json_path=path)["throughput"]
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed", "ok", "ok"]
    assert rows[2]["error"] == "RuntimeError: this policy is broken"
    again = measured([broken, "snapkv(budget=0.5)"], [1, 2], json_path=path, resume=True)["throughput"]
    kept = {(row["method"], row["batch"]): row for row in again if row["status"] == "ok"}
    assert len(again) == 6 and all(kept[row["method"], row["batch"]]["step_ms"] == row["step_ms"] for row in rows if row["status"] == "ok")
    assert json.loads(path.read_text())["throughput"] == json.loads(json.dumps(again))


def test_the_command(tmp_path: Path) -> None:
    model, data = save_tiny(tmp_path / "tiny"), tmp_path / "speed.json"
    words = ["compare", "--model", str(model), "--device", "cpu", "--methods", "snapkv(budget=0.5)", "--lengths", "200", "--batches", "1,2"]
    words += ["--steps", "2", "--no-floor", "--json", str(data)]
    run = CliRunner(env={"COLUMNS": "110"}).invoke
    result = run(app, words)
    assert result.exit_code == 0, result.output
    assert "tokens per second  decoding after 200 tokens" in result.stdout and "batch 2" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith("snapkv(budget=0.5)"))
    assert line.count("x") == 2 and "kB" in line and len(json.loads(data.read_text())["throughput"]) == 4
    for change, says in (
        (["--batches", "0"], "'0' is no batch size"), (["--steps", "0"], "steps must be"), (["--html", "x.html"], "name --tasks"),
    ):  # fmt: skip
        failed = run(app, [*words, *change])
        assert failed.exit_code == 2 and says in failed.stderr and "Traceback" not in failed.stderr
