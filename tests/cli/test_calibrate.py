from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.methods.cache.needles import pocket
from typer.testing import CliRunner

from saccade.cli.calibrate import cut_samples
from saccade.cli.main import app
from saccade.core import Plan
from saccade.evaluate.prompts import Codec
from saccade.methods.decode.loki import Loki


@pytest.fixture(autouse=True)
def _no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("SACCADE_DEBUG", raising=False)


def run(*arguments: str):
    return CliRunner().invoke(app, ["calibrate", *arguments])


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


class Words:
    """A tokenizer whose tokens are words, several bytes each."""

    bos_token_id = 7

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [100 + len(word) for word in text.split()]
        return {"input_ids": [7, *ids] if add_special_tokens else ids}


def test_a_plan_is_written_and_used(tmp_path: Path) -> None:
    out = tmp_path / "plan.safetensors"
    result = run("minference(growth=1.0)", "-o", str(out), "--length", "128", "--batches", "1", "--seed", "3")
    assert result.exit_code == 0 and result.stdout == f"plan: {out}\n", result.output
    plan = Plan.load(out)
    assert (plan.slug, plan.spec) == ("minference", "minference(growth=1.0)")
    facts = {"batches": 1, "tokens": 128, "seed": 3, "length": 128, "text": "shipped"}
    assert facts.items() <= plan.notes.items()
    assert plan.tensor(7, "pattern").shape == (6,) and int(plan.tensor(0, "length")) == 128
    plan.check_model(pocket())
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_the_seed_decides(tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / f"{name}.safetensors"
        assert run("loki", "-o", str(out), "--length", "64", "--batches", "1", "--seed", seed).exit_code == 0
        written.append(Plan.load(out))
    a, b, c = (plan.tensors["layer.0.explained"] for plan in written)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert written[0].notes == written[1].notes


def test_a_text_of_ones_own(tmp_path: Path) -> None:
    data, out = tmp_path / "own.txt", tmp_path / "plan.safetensors"
    data.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    assert run("loki", "--data", str(data), "-o", str(out), "--length", "64", "--batches", "2").exit_code == 0
    notes = Plan.load(out).notes
    assert (notes["text"], notes["batches"], notes["tokens"]) == ("own.txt", 2, 128)


def test_samples_are_exact_and_begin_like_any_sequence() -> None:
    codec = Codec(Words())
    text = b"one three seventeen to the " * 400
    samples = cut_samples(codec, text, length=300, count=4, seed=0)
    assert [tuple(sample.shape) for sample in samples] == [(1, 300)] * 4
    assert all(int(sample[0, 0]) == 7 and sample.dtype == torch.int64 for sample in samples)
    again = cut_samples(codec, text, length=300, count=4, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(samples, again, strict=True))
    assert any(not torch.equal(samples[0], other) for other in samples[1:])


def test_a_text_whose_tokens_grow_longer_still_gives_whole_samples() -> None:
    text = b"a b c d " * 300 + b"extraordinarily-long-words " * 400
    for seed in range(5):
        (sample,) = cut_samples(Codec(Words()), text, length=500, count=1, seed=seed)
        assert sample.shape == (1, 500)
    with pytest.raises(ValueError, match="fewer than a sample of 5000: give a longer text"):
        cut_samples(Codec(Words()), text, length=5000, count=1, seed=0)


def test_what_the_user_can_mend_is_one_sentence(tmp_path: Path) -> None:
    out, short = str(tmp_path / "plan.safetensors"), tmp_path / "short.txt"
    short.write_text("too little")
    assert "snapkv has no offline part" in refused("snapkv", "-o", out)
    assert "did you mean minference" in refused("minferense", "-o", out)
    assert "the folder" in refused("minference", "-o", str(tmp_path / "none" / "plan.safetensors"))
    assert "--length 1 is too small" in refused("minference", "-o", out, "--length", "1")
    assert "--batches 0 is too small" in refused("minference", "-o", out, "--batches", "0")
    assert "does not exist" in refused("minference", "-o", out, "--data", str(tmp_path / "none.txt"))
    assert "at least 4096" in refused("minference", "-o", out, "--data", str(short))
    assert "there is no folder" in refused("minference", "-o", out, "--model", str(tmp_path / "nothing"))
    assert "32768 positions of pocket" in refused("minference", "-o", out, "--length", "40000")
    assert not Path(out).exists()


class Stop(Exception):
    """An interruption between two samples."""


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException], *arguments: str):
    """Run the command, which is stopped when it has measured `after` layers."""
    measured = []
    whole = Loki.measure

    def measure(self, ctx, q, k, v):
        measured.append(ctx.layer)
        if len(measured) > after:
            raise error()
        return whole(self, ctx, q, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(Loki, "measure", measure)
        result = run(*arguments)
    return result


def test_an_interrupted_run_goes_on_to_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    partial = tmp_path / "out.safetensors.partial.safetensors"
    settings = ("--length", "64", "--batches", "3", "--seed", "5")
    assert run("loki", "-o", str(whole), *settings).exit_code == 0
    # in the middle of the second sample of 8 layers
    stopped = interrupted(monkeypatch, 12, KeyboardInterrupt, "loki", "-o", str(out), *settings)
    assert stopped.exit_code == 130 and not out.exists() and partial.exists()
    assert f"What was measured is in {partial}; the same command goes on." in stopped.stderr
    again = interrupted(monkeypatch, 8, Stop, "loki", "-o", str(out), *settings)
    assert isinstance(again.exception, Stop), "the second sample was measured, the third was not"
    measured = []
    layer = Loki.measure
    monkeypatch.setattr(Loki, "measure", lambda self, ctx, *qkv: measured.append(ctx.layer) or layer(self, ctx, *qkv))
    assert run("loki", "-o", str(out), *settings).exit_code == 0
    assert measured == list(range(8)), "only the third sample is left"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, whole.name]


def test_a_partial_file_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = tmp_path / "out.safetensors", tmp_path / "own.txt"
    partial = tmp_path / "out.safetensors.partial.safetensors"
    data.write_text("All work and no play makes Jack a dull boy.\n" * 100)
    settings = ("loki", "-o", str(out), "--length", "64", "--batches", "2", "--data", str(data))
    interrupted(monkeypatch, 8, KeyboardInterrupt, *settings)
    kept = partial.read_bytes()
    assert "seed 0 (now 1)" in refused(*settings, "--seed", "1")
    assert "batches 2 (now 3)" in refused(*settings, "--batches", "3")
    assert "method 'loki' (now 'loki(dims=0.5)')" in refused("loki(dims=0.5)", *settings[1:])
    assert "dtype 'float32' (now 'bfloat16')" in refused(*settings, "--dtype", "bfloat16")
    data.write_text("All play and no work makes Jack a dull boy.\n" * 100)
    assert "was made from another text" in refused(*settings)
    assert partial.read_bytes() == kept and not out.exists()
    partial.write_bytes(b"no tensors at all")
    assert "does not hold an interrupted calibration" in refused(*settings)
