"""SIGKILL behind any step of a conversion, and while it writes: the same call goes on to the same weights. Full disks: one sentence."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.conversions import POINTS, SALA, run, run_child
from torch import Tensor

from saccade.train.checkpoint import latest_checkpoint
from saccade.train.convert import load

LOLCATS = "lolcats(window=4)"
STEPS = {"transfer": 6, "tune": 4}

# processes forked from one that has imported everything and run nothing: they start at once
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["saccade.train.convert", "peft", "transformers.models.llama.modeling_llama", "tests.train.conversions"])


def whole(to: str, folder: Path) -> tuple[dict[str, Tensor], Path]:
    return run(folder, to), folder


@pytest.fixture(scope="module")
def lolcats(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    return whole(LOLCATS, tmp_path_factory.mktemp("lolcats"))


@pytest.fixture(scope="module")
def sala(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    return whole(SALA, tmp_path_factory.mktemp("sala"))


def killed_at(out: Path, to: str, where: tuple[str, int | str]) -> None:
    """Start the conversion, wait until it has come to the place, and kill it there."""
    marker = out.parent / f"{out.name} {where}"
    child = SERVER.Process(target=run_child, args=(str(out), to, str(marker), where))
    child.start()
    end = time.monotonic() + 300
    while not marker.exists() and child.is_alive():
        assert time.monotonic() < end, "the child took too long"
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"the run ended before it came to {where}"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def all_is_there(out: Path, other: tuple[dict[str, Tensor], Path], found: dict[str, Tensor]) -> None:
    """Weights, on disk as well, and every row of the metrics are those of the run that was not cut off; nothing half-written is left."""
    assert same(found, other[0])
    files = [load_file(folder / "weights" / "model.safetensors") for folder in (out, other[1])]
    assert same(*files)
    for stage, steps in STEPS.items():
        curves = [(folder / stage / "metrics.jsonl").read_text() for folder in (out, other[1])]
        assert curves[0] == curves[1] and len(curves[0].splitlines()) == steps
    assert not list(out.rglob("*.partial*")) and not list(out.rglob("*.old"))


EVERY = [(stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]


@pytest.mark.parametrize("places", [EVERY[4::10], pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_behind_steps_one_after_another(lolcats: tuple[dict[str, Tensor], Path], tmp_path: Path, places: list[tuple[str, int]]):
    for stage, step in places:
        killed_at(tmp_path / "run", LOLCATS, (stage, step))
        # checkpoints are two steps apart: what lies before the last one is never done again
        last = latest_checkpoint(tmp_path / "run" / stage)
        assert (0 if last is None else int(last.name)) == step // 2 * 2
    all_is_there(tmp_path / "run", lolcats, run(tmp_path / "run", LOLCATS))


@pytest.mark.parametrize("stage", ["tune", pytest.param("transfer", marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_is_written(lolcats: tuple[dict[str, Tensor], Path], tmp_path: Path, stage: str):
    out = tmp_path / "run"
    for point in POINTS:
        killed_at(out, LOLCATS, (stage, point))
        last = latest_checkpoint(out / stage)
        assert last is not None and last.name == ("00000004" if point == POINTS[2] else "00000002")
    all_is_there(out, lolcats, run(out, LOLCATS))
    last = latest_checkpoint(out / stage)
    assert last is not None and int(last.name) == STEPS[stage]


@pytest.mark.slow
def test_killed_while_layers_are_chosen_and_while_the_result_is_saved(sala: tuple[dict[str, Tensor], Path], tmp_path: Path):
    out = tmp_path / "run"
    for where in (("choice", 2), ("tune", 3), ("weights", "")):
        killed_at(out, SALA, where)
        assert (out / "layers.json").exists() == (where[0] in ("tune", "weights"))
        with pytest.raises(ValueError, match="holds no converted model"):
            load(out)
    all_is_there(out, sala, run(out, SALA))
    # what was converted once stays whole when the call is given again and cut off
    killed_at(out, SALA, ("weights", ""))
    run(out, SALA)
    assert same(load_file(out / "weights" / "model.safetensors"), load_file(sala[1] / "weights" / "model.safetensors"))


@pytest.mark.slow
def test_killed_at_random_moments(lolcats: tuple[dict[str, Tensor], Path], tmp_path: Path):
    rng, out = Random(int.from_bytes(os.urandom(4), "little")), tmp_path / "run"  # truly any moment
    killed = 0
    for _ in range(3):
        child = SERVER.Process(target=run_child, args=(str(out), LOLCATS, str(tmp_path / "marker"), ("", 0)))
        child.start()
        time.sleep(0.2 + 0.8 * rng.random())
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
    assert killed
    all_is_there(out, lolcats, run(out, LOLCATS))


# -- nothing can be written ------------------------------------------------------------------------------------------------


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write stops half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails_at(stage: str, step: int, out: Path, do: Callable[[], Any]) -> str:
    """The error of a run in which `do` is called behind a step."""

    def progress(row: dict[str, Any]) -> None:
        if (row["stage"], row["step"]) == (stage, step):
            do()

    with pytest.raises(ValueError) as caught:
        run(out, LOLCATS, progress)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "step"), [("transfer", 3), ("tune", 3)])
def test_a_full_disk_keeps_the_last_good_checkpoint(lolcats: tuple[dict[str, Tensor], Path], tmp_path: Path, stage: str, step: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        size = next((tmp_path / stage).rglob("state.safetensors")).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    try:
        told = fails_at(stage, step, tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"checkpoint of step {step + 1} can't be written" in told and "(file too large)" in told
    assert told.endswith(f"the last good one is {tmp_path / stage / 'checkpoints' / '00000002'}")
    all_is_there(tmp_path, lolcats, run(tmp_path, LOLCATS))


def test_a_disk_that_fills_up_before_the_result_is_saved(lolcats: tuple[dict[str, Tensor], Path], tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (lolcats[1] / "weights" / "model.safetensors").stat().st_size
    try:
        told = fails_at("tune", 4, tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1])))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = tmp_path / "tune" / "checkpoints" / "00000004"
    assert told.startswith(f"the weights can't be written to {tmp_path} (file too large): free some space") and told.endswith(str(last))
    assert not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(ValueError, match="holds no converted model"):
        load(tmp_path)
    all_is_there(tmp_path, lolcats, run(tmp_path, LOLCATS))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_metrics_on_a_full_disk(tmp_path: Path):
    def fill() -> None:
        path = tmp_path / "transfer" / "metrics.jsonl"
        path.unlink()
        path.symlink_to("/dev/full")

    told = fails_at("transfer", 3, tmp_path, fill)
    assert told.startswith(f"metrics.jsonl can't be written to {tmp_path} (no space left on device)")
    assert told.endswith(f"the last good checkpoint is {tmp_path / 'transfer' / 'checkpoints' / '00000002'}")


def test_a_place_that_can_not_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^the settings can't be written to .*file/out \(not a directory\).*there is no checkpoint yet$"):
        run(tmp_path / "file" / "out", LOLCATS)


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from saccade.models.pocket import path as pocket_path

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(pocket_path(), local_files_only=True).save_pretrained(folder)
    (folder / "text.txt").write_text("\n".join(f"some words of text in line number {i} of the file" for i in range(400)))
    words = ["convert", "--model", str(folder), "--data", str(folder / "text.txt"), "--device", "cpu", "--to", "lolcats(window=8)"]
    words += ["--transfer", "60", "--tune", "60", "--batch", "2", "--context", "64", "--length", "256", "--samples", "1"]
    return [sys.executable, "-c", "from saccade.cli.main import app_entry; app_entry()", *words, "--out"]


def given(command: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, str(out)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_itself_killed_and_given_again(command: list[str], tmp_path: Path):
    assert given(command, tmp_path / "whole").returncode == 0
    rng, out, seen = Random(), tmp_path / "cut", []

    def rows() -> int:
        return sum(path.read_bytes().count(b"\n") for path in out.glob("*/metrics.jsonl"))

    for goal in (rng.randint(1, 50), rng.randint(51, 70), rng.randint(71, 119)):
        child = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and rows() < goal:
            time.sleep(0.002)
        child.kill()
        child.wait()
        seen.append(rows())
        assert child.returncode == -signal.SIGKILL, seen
    assert given(command, out).returncode == 0
    for file in ("weights/model.safetensors", "transfer/metrics.jsonl", "tune/metrics.jsonl"):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), (file, seen)


@pytest.mark.slow
def test_the_command_on_a_full_disk_says_so_in_one_line(command: list[str], tmp_path: Path):
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command]
    failed = given(limited, tmp_path / "out")
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    line = failed.stderr.strip().splitlines()[-1]
    assert line.startswith("error: the checkpoint of step 50 can't be written") and "there is none before it" in line
    shutil.rmtree(tmp_path / "out")
    assert given(command, tmp_path / "out").returncode == 0
