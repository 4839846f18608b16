"""A training run of a second, and what it left: shared by the tests of the trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from saccade.train.loop import train
from saccade.train.recipe import Recipe, recipe_from

MODEL = {
    "architecture": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "attention_dropout": 0.1,
}  # fmt: skip
TINY: dict[str, Any] = {
    "model": MODEL,
    "data": {"set": "mqar", "length": 32, "pairs": 4, "fewest": 2, "vocab": 32},
    "optimizer": {"name": "muon", "rate": 5e-3},
    "schedule": {"name": "cosine", "warmup": 3},
    "evaluate": {"every": 5, "batches": 2, "data": {"fewest": 4}},
    "steps": 18,
    "batch": 8,
    "accumulate": 2,
    "checkpoint": 4,
    "device": "cpu",
    "threads": 1,
}


def tiny(**changes: Any) -> Recipe:
    """The recipe of TINY with some keys changed; None leaves a key out."""
    return recipe_from({key: value for key, value in {**TINY, **changes}.items() if value is not None})


def rows(out: Path) -> list[dict[str, Any]]:
    """The metrics without the clock."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out)]


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(out / "weights" / "model.safetensors") for out in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def run_child(changes: dict[str, Any], out: str, stage: str = "", marker: str = "") -> None:
    """A run in a process of its own that stops dead in the middle of writing its third checkpoint, at `stage`, and says so in `marker`."""
    from saccade.train import checkpoint

    written = {"checkpoints": 0}

    def hang() -> None:
        Path(marker).touch()
        while True:
            torch.zeros(1)

    real_save, real_replace, real_remove = checkpoint.save_file, checkpoint.os.replace, checkpoint.shutil.rmtree

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        written["checkpoints"] += 1
        real_save(tensors, path)
        if stage == "half written" and written["checkpoints"] == 3:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)
            hang()

    def replace(source: Path, target: Path) -> None:
        if stage == "before the rename" and written["checkpoints"] == 3 and "checkpoints" in str(target):
            hang()
        real_replace(source, target)

    def remove(path: Path, ignore_errors: bool = False) -> None:
        if stage == "before the older one goes" and written["checkpoints"] == 3 and path.name[0] != ".":
            hang()
        real_remove(path, ignore_errors=ignore_errors)

    if stage:
        checkpoint.save_file, checkpoint.os.replace, checkpoint.shutil.rmtree = save, replace, remove
    train(tiny(**changes), out)
