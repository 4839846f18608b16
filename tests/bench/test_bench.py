"""The benchmarks measure what they say: densities, errors, a file that is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saccade.bench.attend import random_tiles
from saccade.bench.timing import summary
from saccade.cli.main import app

runner = CliRunner()


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_tiles_have_the_density_asked_for(density: float) -> None:
    s = random_tiles(4096, 4, 64, density, "cpu")
    assert abs(s.density() - density) < 0.03
    assert s.dense_mask().diagonal(dim1=-2, dim2=-1).all(), "every query reads itself"


def test_speedup_is_taken_round_by_round() -> None:
    found = summary({"dense": [10.0, 20.0, 40.0], "sparse": [5.0, 5.0, 20.0]}, "dense")
    assert found["sparse"]["speedup"] == 2.0 and found["dense"]["speedup"] == 1.0 and found["sparse"]["median_ms"] == 5.0


@pytest.mark.parametrize("kind", ["attend", "decode"])
def test_command_checks_and_writes(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    small = ["--n", "1024", "--heads", "4", "--kv-heads", "2", "--selected", "64", "--repeats", "2", "--density", "0.3"]
    done = runner.invoke(app, ["bench", kind, *small, "--check", "--json", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["check"]["ok"] and found["impl"] == "cpu" and 0 < found["density"] < 0.5
    assert found["check"]["error"] <= found["check"]["allowed"] < 1e-4
    assert found["times"]["sparse"]["median_ms"] > 0 and found["speedup"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attend", "--heads", "3", "--kv-heads", "2"], "not a multiple"),
        (["decode", "--n", "512", "--selected", "4000"], "more than the 512 keys"),
        (["attend", "--device", "cuda"], "no CUDA GPU"),
        (["attend", "--json", "/no/such/folder/x.json"], "does not exist"),
        (["attend", "--n", "512", "--impl", "magic"], "not one of"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    done = runner.invoke(app, ["bench", *arguments])
    assert done.exit_code == 2 and words in done.output + done.stderr and "Traceback" not in done.output
