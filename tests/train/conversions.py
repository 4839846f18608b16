"""A conversion of a second that stops dead where it is told to: for tests that kill it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import torch
from tests.train.test_convert import batches, settings, teacher
from torch import Tensor

POINTS = ("half written", "before the rename", "before the older one goes")  # in writing a checkpoint
SALA = "minicpm-sala(block=4, top=3, local=4, window=4, stride=2, dense=64)"


def measure(model: Any) -> tuple[float, float]:
    """The mean probability of the right token, twice."""
    ids = batches(1000, 2)
    with torch.no_grad():
        right = model(input_ids=ids).logits[:, :-1].softmax(-1).gather(2, ids[:, 1:, None])
    return float(right[:, 20:].mean()), float(right.mean())


def run(out: Path, to: str, progress: Any = None) -> dict[str, Tensor]:
    """Convert, and the weights of the result; of lolcats all three layers, of minicpm-sala one of four."""
    from saccade.train.convert import convert

    torch.set_num_threads(1)
    layers = 3 if to.startswith("lolcats") else 4
    return dict(convert(teacher(num_hidden_layers=layers), batches, settings(out, to=to), progress, measure).named_parameters())


def run_child(out: str, to: str, marker: str, where: tuple[str, int | str]) -> None:
    """`run` in a process of its own that hangs behind step `where = (stage, step)`, or at a point of writing the stage's second checkpoint,
    or in the middle of saving ("weights", ""), and says so in `marker`."""
    from saccade.train import checkpoint
    from saccade.train import convert as module

    stage, step = where

    def hang() -> NoReturn:
        Path(marker).touch()
        while True:
            torch.zeros(1)

    def progress(row: dict[str, Any]) -> None:
        if (row["stage"], row["step"]) == where:
            hang()

    real_save, real_replace, real_remove = checkpoint.save_file, checkpoint.os.replace, checkpoint.shutil.rmtree

    def second(path: Path) -> bool:
        return f"/{stage}/" in str(path) and "00000004" in str(path)

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        real_save(tensors, path)
        if step == POINTS[0] and second(path):
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            hang()

    def replace(source: Path, target: Path) -> None:
        if step == POINTS[1] and second(target):
            hang()
        if stage == "weights" and Path(target).name == "weights":
            hang()
        real_replace(source, target)

    def remove(path: Path, ignore_errors: bool = False) -> None:
        if step == POINTS[2] and f"/{stage}/" in str(path) and Path(path).name == "00000002":
            hang()
        real_remove(path, ignore_errors=ignore_errors)

    checkpoint.save_file, checkpoint.os.replace, checkpoint.shutil.rmtree = save, replace, remove
    assert module.os.replace is replace
    run(Path(out), to, progress)
