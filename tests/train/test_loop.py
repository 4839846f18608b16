"""The trainer: the loss falls, parts and processes change nothing but rounding, runs resume, and what is wrong is said in a sentence."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import MODEL, TINY, losses, rows, same_weights, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from saccade.train import loop
from saccade.train.checkpoint import latest_checkpoint
from saccade.train.loop import train
from saccade.train.models import build_model
from saccade.train.optimizers import build_optimizers, inner_matrices
from saccade.train.recipe import Rule


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(tiny(), out)
    return out


class Cut(Exception):
    pass


def cut_off(recipe: Any, out: Path, step: int) -> None:
    """Run a recipe until the row of `step` is written, and no further."""

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise Cut

    with pytest.raises(Cut):
        train(recipe, out, stop)


def test_what_a_run_leaves(finished: Path) -> None:
    found = rows(finished)
    assert [row["step"] for row in found] == list(range(1, 19)) and found[-1]["tokens"] == 18 * 8 * 32
    assert [row["step"] for row in found if "eval accuracy" in row] == [5, 10, 15, 18]
    assert found[-1]["loss"] < found[0]["loss"] - 0.05  # the values' half of the vocabulary is learnt at once
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["00000018"]
    page = (finished / "curve.html").read_text()
    assert "accuracy" in page and "mqar" in page and page.count("<path") >= 8
    model = AutoModelForCausalLM.from_pretrained(finished / "weights")
    assert model.config.vocab_size == 32
    again = train(tiny(), finished)  # a finished run has nothing to do
    assert again.steps == 18 and again.scores["accuracy"] == found[-1]["eval accuracy"] and rows(finished) == found


@pytest.mark.parametrize("changes", [
    {"optimizer": {"name": "adamw", "rate": 3e-3}, "schedule": {"name": "wsd", "warmup": 2}},
    pytest.param({"precision": "bfloat16", "gradient_checkpointing": True}, marks=pytest.mark.slow),
    {"data": {"set": "needles", "length": 320}, "model": {**MODEL, "max_position_embeddings": 512}, "steps": 5, "evaluate": {"batches": 1},
     "batch": 2, "checkpoint": 2},
])  # fmt: skip
def test_resumes_bit_for_bit(changes: dict[str, Any], sources: Path, tmp_path: Path) -> None:
    if "data" in changes:
        changes = {**changes, "data": {**changes["data"], "folder": str(sources), "megabytes": 1.0}}
    recipe = tiny(**changes)
    train(recipe, tmp_path / "whole")
    cut = 11 if recipe.steps == 18 else 3
    cut_off(recipe, tmp_path / "cut", cut)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # a torn line
    train(recipe, tmp_path / "cut")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path: Path) -> None:
    steady = {"schedule": {"name": "constant", "warmup": 3}, "evaluate": {}}
    train(tiny(**steady, steps=6), tmp_path / "a")
    train(tiny(**steady, steps=9), tmp_path / "a")
    train(tiny(**steady, steps=9), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_parts_of_a_batch_only_round_differently(finished: Path, tmp_path: Path) -> None:
    still = {"model": {**MODEL, "attention_dropout": 0.0}, "steps": 8, "evaluate": {}}
    train(tiny(**still, accumulate=1), tmp_path / "one")
    train(tiny(**still, accumulate=4), tmp_path / "four")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "four"), abs=2e-4)
    assert losses(tmp_path / "one") != losses(finished)[:8]


def test_batches_follow_from_seed_and_step_alone() -> None:
    source = loop.build_set(TINY["data"])
    whole = source.rows(3, "train", 7, 8, 0, 8)
    halves = [source.rows(3, "train", 7, 8, first, first + 4) for first in (0, 4)]
    assert torch.equal(whole[0], torch.cat([tokens for tokens, _ in halves]))
    others = [source.rows(seed, stream, number, 8, 0, 8) for seed, stream, number in ((4, "train", 7), (3, "evaluate", 7), (3, "train", 8))]
    assert all(not torch.equal(whole[0], tokens) for tokens, _ in others)


def test_a_run_by_the_clock(tmp_path: Path) -> None:
    result = train(tiny(steps=None, seconds=0.3), tmp_path)
    assert result.steps >= 1 and result.seconds >= 0.3 and rows(tmp_path)[-1]["step"] == result.steps


def test_bytes_come_with_their_tokenizer(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox\n" * 200)
    recipe = tiny(data={"set": "bytes", "folder": str(folder), "length": 32}, evaluate={"every": 0})
    result = train(recipe, tmp_path / "run")
    assert result.scores["bits"] == pytest.approx(result.scores["loss"] / 0.6931471805599453) and result.scores["bits"] < 8.3
    assert AutoTokenizer.from_pretrained(result.weights)("a").input_ids == [1, 100]
    (folder / "a.txt").write_text("another text altogether\n" * 200)
    from saccade.train.sets import windows

    windows._read.cache_clear()
    windows._digest.cache_clear()
    with pytest.raises(ValueError, match=r"the files that data reads have changed since .*00000018"):
        train(recipe, tmp_path / "run")


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write stops half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_last_good_checkpoint(finished: Path, tmp_path: Path) -> None:
    cut_off(tiny(), tmp_path, 5)
    good = latest_checkpoint(tmp_path)
    assert good is not None and good.name == "00000004"
    size = (good / "state.safetensors").stat().st_size
    told = r"checkpoint of step 8 can't be written .*\(file too large\).*last good one is .*00000004$"
    with disk_of(size // 2), pytest.raises(ValueError, match=told):
        train(tiny(), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]  # nothing half-written lies around
    train(tiny(), tmp_path)
    assert rows(tmp_path) == rows(finished) and same_weights(tmp_path, finished)


def test_no_space_in_the_middle_of_a_write(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from saccade.train import checkpoint

    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device", str(path))

    cut_off(tiny(), tmp_path, 5)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match=r"\(no space left on device\): free some space .*00000004$"):
        train(tiny(), tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", real)
    train(tiny(), tmp_path)
    assert rows(tmp_path) == rows(finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_on_a_full_disk(tmp_path: Path) -> None:
    cut_off(tiny(), tmp_path, 5)
    (tmp_path / "metrics.jsonl").unlink()

    def fill(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            (tmp_path / "metrics.jsonl").unlink()
            (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    with pytest.raises(ValueError, match=r"^metrics.jsonl can't be written .*\(no space left on device\).*00000004$"):
        train(tiny(), tmp_path, fill)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"can't be written to .*file/run .*choose another folder"):
        train(tiny(), tmp_path / "file" / "run")


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {**MODEL, "hidden_size": 32}}, r"of a run with model.hidden_size 16, but the recipe says 32: restore it"),
    ({"seed": 1}, r"of a run with seed 0, but the recipe says 1"),
    ({"data": {"set": "mqar", "length": 32, "pairs": 4, "vocab": 32}}, r"data.fewest 2, but the recipe says null"),
    ({"optimizer": {"name": "adamw"}}, r"optimizer.name \"muon\", but the recipe says \"adamw\""),
])  # fmt: skip
def test_a_checkpoint_of_another_recipe_is_refused(finished: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes), finished)


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": {**MODEL, "hiden_size": 16}}, "model has no argument 'hiden_size' .*did you mean hidden_size"),
    ({"model": {**MODEL, "vocab_size": 8}}, "data uses 32 token ids, but the model knows 8"),
    ({"model": {**MODEL, "max_position_embeddings": 16}}, "a sequence of the data has 32 tokens, but the model serves 16"),
    ({"model": {**MODEL, "num_attention_heads": 3}}, "model can't be .*as"),
    ({"model": {"architecture": "lama"}}, "'lama', which transformers does not know: did you mean .*llama"),
    ({"model": {"hidden_size": 16}}, "names neither layers nor an architecture: give layers"),
    ({"model": {"layers": ["softmx"]}}, "model: there is no method 'softmx': did you mean softmax"),
    ({"model": {"layers": ["softmax"], "heads": 16}}, "model has no argument 'heads'"),
    ({"model": {"layers": ["softmax", "deltanet"], "num_hidden_layers": 3}}, "layers names 2 mixers and num_hidden_layers is 3"),
    ({"model": "nowhere/at/all"}, "no folder with a config.json"),
    ({"batch": 9, "accumulate": 3, "data": {"set": "mqr"}}, "the set 'mqr', which there is not: did you mean mqar"),
    ({"data": {"set": "mqar", "pair": 3}}, "data has no key 'pair': did you mean pairs"),
    ({"data": {"set": "mqar", "length": 10}}, "32 pairs and their queries take 128 tokens"),
    ({"evaluate": {"data": {"pairs": "four"}}}, "evaluate.data.pairs is 'four', expected a whole number"),
])  # fmt: skip
def test_what_does_not_fit_is_said(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train(tiny(**changes), tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    wild = tiny(optimizer={"name": "adamw", "rate": 1e30, "clip": 0}, schedule={"name": "constant", "warmup": 0}, checkpoint=1)
    with pytest.raises(ValueError, match=r"at step \d+ the loss is .*(nan|inf).*lower optimizer.rate.*last good checkpoint is .*0000000\d"):
        train(wild, tmp_path)


def test_models_of_every_kind(tmp_path: Path) -> None:
    assert build_model("pocket", 320).num_parameters() > 12e6
    model = {"layers": ["deltanet", "softmax"], "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    hybrid, again = build_model(model, 40), build_model(model, 40, seed=1)
    assert hybrid.config.vocab_size == 40 and not torch.equal(hybrid.lm_head.weight, again.lm_head.weight)
    hybrid.save_pretrained(tmp_path / "saved")
    loaded = build_model(str(tmp_path / "saved"))
    assert torch.equal(loaded.lm_head.weight, hybrid.lm_head.weight) and loaded.dtype == torch.float32
    cut_off(tiny(model=model), tmp_path / "cut", 6)
    train(tiny(model=model), tmp_path / "cut")
    train(tiny(model=model), tmp_path / "whole")
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and same_weights(tmp_path / "cut", tmp_path / "whole")


def test_every_parameter_has_one_optimizer() -> None:
    model = build_model({**MODEL, "vocab_size": 40})
    for name in ("adamw", "muon"):
        groups = [group for optimizer in build_optimizers(model, Rule(name=name)) for group in optimizer.param_groups]
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
        assert all(group["weight_decay"] == 0 for group in groups for p in group["params"] if p.ndim < 2)
    inner = {id(p) for p in inner_matrices(model)}
    assert len(inner) == 2 * 7 and id(model.lm_head.weight) not in inner and id(model.model.embed_tokens.weight) not in inner


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    still = {**TINY, "model": {**MODEL, "attention_dropout": 0.0, "tie_word_embeddings": True}, "gradient_checkpointing": True}
    train(tiny(**{key: still[key] for key in ("model", "gradient_checkpointing")}), tmp_path / "one")
    script = tmp_path / "launch.py"
    script.write_text(
        "import json, sys\nfrom saccade.train.loop import train\nfrom saccade.train.recipe import recipe_from\n"
        "recipe = recipe_from(json.loads(sys.argv[2]))\n"
        "train(recipe.lasting(int(sys.argv[3])) if len(sys.argv) > 3 else recipe, sys.argv[1])\n"
    )

    def launch(out: Path, *more: str) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
        subprocess.run([*command, str(out), json.dumps(still), *more], check=True, timeout=300, capture_output=True)

    launch(tmp_path / "two")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == list(range(1, 19))
    for key in ("loss", "eval loss"):
        assert [row[key] for row in two if key in row] == pytest.approx([row[key] for row in one if key in row], abs=1e-3)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "weights").config.vocab_size == 32
    # a checkpoint holds whole tensors: one process goes on with what two have written, and two with their own
    steady = {"schedule": {"name": "constant", "warmup": 3}, "evaluate": {}}
    still |= steady
    launch(tmp_path / "three", "8")
    changes = {key: still[key] for key in ("model", "gradient_checkpointing", "schedule", "evaluate")}
    alone = {**changes, "steps": 12}
    train(tiny(**alone), tmp_path / "four")
    launch(tmp_path / "three", "10")
    train(tiny(**alone), tmp_path / "three")
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "four"), abs=1e-3)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path: Path) -> None:
    still = {"model": {**MODEL, "attention_dropout": 0.0}, "steps": 6, "evaluate": {}, "accumulate": 1}
    train(tiny(**still, compile=True), tmp_path / "compiled")
    train(tiny(**still), tmp_path / "plain")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
