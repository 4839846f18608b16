"""Checkpoints that resume exactly: weights, optimizer state, random state and counters, as safetensors and JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

FOLDER = "checkpoints"


def save_checkpoint(
    out: Path, step: int, model: nn.Module, optimizers: Sequence[Optimizer], counters: dict[str, Any]
) -> Path:
    """Write `out/checkpoints/<step>` under a temporary name, rename it, and remove the older ones."""
    folder = out / FOLDER / f"{step:08d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for slot, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{slot}.{name}": value for name, value in state.items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, partial / "state.safetensors")
    (partial / "counters.json").write_text(json.dumps({"step": step, **counters}), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def latest_checkpoint(out: Path) -> Path | None:
    """The folder of the last complete checkpoint under `out`, or None."""
    found = sorted(path for path in (out / FOLDER).glob("[0-9]*") if path.is_dir())
    return found[-1] if found else None


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint into the model, the optimizers and torch's random generators; returns the counters.

    Raises ValueError when the checkpoint is of another model.
    """
    tensors = load_file(folder / "state.safetensors")
    own = dict(model.named_parameters())
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if own.keys() != saved.keys() or any(own[name].shape != t.shape for name, t in saved.items()):
        raise ValueError(f"the checkpoint {folder} is of a model with other shapes; choose another output folder")
    with torch.no_grad():
        for name, t in saved.items():
            own[name].copy_(t)
    for i, optimizer in enumerate(optimizers):
        prefix = f"optimizer.{i}."
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, t in tensors.items():
            if name.startswith(prefix):
                slot, field = name.removeprefix(prefix).split(".", 1)
                state.setdefault(int(slot), {})[field] = t
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return json.loads((folder / "counters.json").read_text(encoding="utf-8"))
