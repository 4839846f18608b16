"""`saccade bench` from end to end on a CPU: grids, files, comparisons, and words for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from saccade.bench.result import NUMBERS, SCHEMA, TEXTS
from saccade.cli.main import app

runner = CliRunner()
SOME = {
    "decode": ["pages", "4 bits"], "estimate": ["pooled scores", "choose top-k", "tile maxima 4 bits"], "scan": ["kda", "lightning"],
    "quant": ["pack 4 bits", "quantise 4 bits by channel", "hadamard"],
}  # fmt: skip


def bench(*arguments: str) -> Any:
    return runner.invoke(app, ["bench", *arguments], env={"COLUMNS": "300"})


def check_schema(found: dict[str, Any], op: str) -> None:
    assert found["schema"] == SCHEMA and found["op"] == op and found["complete"] and found["seconds"] > 0 and found["created"]
    assert {"torch", "triton", "device_name"} <= set(found["environment"]) and found["command"].startswith(f"saccade bench {op}")
    assert found["ceilings"]["copy"] > 0 and found["ceilings"]["matmul"] > 0
    assert set(found["libraries"]) == {"flash_attn", "sageattention", "fla"}
    for row in found["rows"]:
        assert set(row) == {*TEXTS, *NUMBERS, "case", "ok"} and row["op"] == op and row["case"]["n"] > 0
        assert row["status"] == "ok" and row["ms"] > 0 and row["ms_low"] <= row["ms"] <= row["ms_high"] and row["impl"], row
        assert row["role"] != "ours" or (row["ok"] is True and row["error"] <= row["allowed"]), row
    assert {"saccade"} < {row["contestant"] for row in found["rows"]}


@pytest.mark.slow
def test_the_quick_grid_of_attend(tmp_path: Path) -> None:
    out, page = tmp_path / "bench.json", tmp_path / "bench.html"
    done = bench("attend", "--grid", "quick", "--device", "cpu", "--check", "--json", str(out), "--html", str(page))
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads(out.read_text())
    check_schema(found, "attend")
    assert {"dense forward", "dense forward+backward", "tiles", "pages of 16", "single tokens", "pooled top-k", "int8 dense"} == {
        row["family"] for row in found["rows"]
    }
    slopes = {line["contestant"]: line["exponent"] for line in found["growth"]}
    assert slopes.keys() == {"saccade", "SDPA"} and all(0.5 < slope < 3.5 for slope in slopes.values())
    assert "exponent" in done.output and "GFLOP/s" in done.output and "choosing" in done.output and f"Page: {page}" in done.output
    assert page.read_text().startswith("<!doctype html>")

    slow = json.loads(out.read_text())
    for row in slow["rows"]:
        for key in ("ms", "ms_low", "ms_high"):
            row[key] /= 1000
    old = tmp_path / "old.json"
    old.write_text(json.dumps(slow))
    again = ["attend", "--grid", "quick", "--device", "cpu", "--case", "tiles", "--compare", str(old)]
    done = bench(*again)
    assert done.exit_code == 0 and "% slower" in done.output and "in one of the two only" in done.output
    done = bench(*again, "--fail-slower", "50")
    assert done.exit_code == 1 and "got slower by more than 50 %" in done.stderr


@pytest.mark.parametrize("op", SOME)
@pytest.mark.slow
def test_some_of_each_other_grid(op: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    picks = [word for name in SOME[op] for word in ("--case", name)]
    done = bench(op, "--grid", "quick", "--device", "cpu", "--check", "--json", str(out), *picks)
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads(out.read_text())
    check_schema(found, op)
    assert {row["family"] for row in found["rows"]} == set(SOME[op])


def test_one_case_prints_its_result() -> None:
    done = bench("scan", "--case", "delta", "--n", "128", "--heads", "2", "--dim", "16", "--check")
    assert done.exit_code == 0, done.output + done.stderr
    found = json.loads(done.stdout)
    check_schema(found, "scan")
    assert found["rows"][0]["case"] == {"n": 128, "heads": 2, "dim": 16, "batch": 1} and found["rows"][0]["family"] == "delta"
    done = bench("quant", "--n", "256", "--heads", "1")
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"][0]["family"] == "pack 4 bits"
    done = bench("estimate", "--n", "256", "--heads", "4", "--kv-heads", "2", "--dim", "16")
    assert done.exit_code == 0 and json.loads(done.stdout)["rows"][0]["ok"] is True


def test_a_wrong_result_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.bench import quant_cases

    monkeypatch.setattr(quant_cases.quant, "hadamard", lambda x, impl: x)
    arguments = ["quant", "--grid", "quick", "--device", "cpu", "--case", "hadamard"]
    assert bench(*arguments).exit_code == 0
    done = bench(*arguments, "--check")
    assert done.exit_code == 1 and "further off than allowed" in done.stderr and "error above" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attend", "--grid", "quick", "--n", "512"], "--n is for one case"),
        (["attend", "--grid", "quick", "--case", "tile"], "do you mean 'tiles'?"),
        (["attend", "--grid", "quick", "--json", "x.json", "--html", "x.json"], "give two files"),
        (["attend", "--grid", "quick", "--fail-slower", "5"], "--compare FILE"),
        (["attend", "--grid", "quick", "--compare", "/no/such/file.json"], "no such file"),
        (["attend", "--grid", "quick", "--device", "cuda"], "no CUDA GPU"),
        (["attend", "--device", "cube"], "give cpu, cuda or cuda:N"),
        (["attend", "--device", "meta"], "run on cpu and cuda"),
        (["attend", "--html", "x.html"], "add --grid quick"),
        (["attend", "--case", "tiles"], "add --grid quick"),
        (["attend", "--n", "64"], "from 256 tokens on"),
        (["scan", "--case", "magic"], "no form of scan"),
        (["scan", "--case", "kda", "--case", "delta"], "one case is timed"),
        (["scan", "--kv-heads", "2"], "no option of scan"),
        (["estimate", "--case", "pooled", "--n", "128"], "no function of estimate"),
        (["estimate", "--n", "100"], "multiple of 128"),
        (["quant", "--n", "64", "--heads", "1", "--impl", "auto", "--dtype", "float32", "--case", "magic"], "no function of quant"),
        (["scan", "--n", "64", "--heads", "1", "--impl", "magic"], "the case did not run: impl 'magic' is not one of"),
        (["quant", "--n", "64", "--impl", "reference"], "an implementation in torch and one in triton"),
        (["decode", "--grid", "quick", "--device", "cpu", "--case", "pages", "--impl", "magic"], "no case ran"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2 and words in done.output + done.stderr, done.output + done.stderr
    assert "Traceback" not in done.output and len(done.stderr.strip().splitlines()) == 1
