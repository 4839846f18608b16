"""SIGKILL at any moment, also while a checkpoint is being written: the same command goes on to the same numbers, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.train.runs import MODEL, TINY, losses, rows, run_child, same_weights, tiny

from saccade.train.checkpoint import FOLDER, latest_checkpoint
from saccade.train.loop import train

STAGES = ("half written", "before the rename", "before the older one goes")

# processes forked from one that has imported everything and run nothing: they start at once
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["saccade.train.loop", "transformers.models.llama.modeling_llama", "tests.train.runs"])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    train(tiny(), out)
    return out


def wait(holds: Callable[[], bool], child: BaseProcess, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not holds() and child.is_alive():
        assert time.monotonic() < end, "the child took too long"
        time.sleep(0.002)


def kill(child: BaseProcess) -> bool:
    """True if it was killed before it ended by itself."""
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def written(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(whole_run: Path, tmp_path: Path) -> None:
    rng = Random(int.from_bytes(os.urandom(4), "little"))  # truly any moment; what follows must hold for every one
    killed, seen = 0, []
    for _ in range(3):
        child = SERVER.Process(target=run_child, args=({}, str(tmp_path)))
        child.start()
        already, more = written(tmp_path), rng.randint(1, 6)
        wait(lambda goal=already + more: written(tmp_path) >= goal, child)
        time.sleep(rng.random() * 0.03)
        killed += kill(child)
        seen.append(written(tmp_path))
    assert killed >= 1, f"no run was cut off: rows {seen}"
    train(tiny(), tmp_path)
    assert rows(tmp_path) == rows(whole_run)
    assert same_weights(tmp_path, whole_run)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_a_checkpoint_is_written(whole_run: Path, tmp_path: Path, stage: str) -> None:
    marker = tmp_path / "stopped"
    out = tmp_path / "run"
    child = SERVER.Process(target=run_child, args=({}, str(out), stage, str(marker)))
    child.start()
    wait(marker.exists, child)
    assert kill(child)
    found = latest_checkpoint(out)
    assert found is not None and found.name == ("00000012" if stage == STAGES[2] else "00000008")
    seen: list[dict[str, Any]] = []
    train(tiny(), out, seen.append)
    assert seen[0]["step"] == int(found.name) + 1
    assert rows(out) == rows(whole_run) and same_weights(out, whole_run)
    assert [path.name for path in (out / FOLDER).iterdir()] == ["00000018"]


@pytest.mark.slow
def test_the_command_itself_killed_and_given_again(tmp_path: Path) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**TINY, "model": {**MODEL, "hidden_size": 32}, "steps": 60}))
    command = [sys.executable, "-m", "saccade.cli.main", "train", str(recipe), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, timeout=300)
    rng, out, cut = Random(), tmp_path / "cut", []
    for _ in range(3):
        child = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        goal = written(out) + rng.randint(1, 20)
        while child.poll() is None and written(out) < goal:
            time.sleep(0.002)
        child.kill()
        child.wait()
        cut.append(written(out))
    subprocess.run([*command, str(out)], check=True, capture_output=True, timeout=300)
    sys.stdout.write(f"killed after rows {cut}; {len(losses(out))} rows in the end\n")
    assert rows(out) == rows(tmp_path / "whole") and same_weights(out, tmp_path / "whole")
