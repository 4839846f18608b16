"""Checkpoints that resume exactly: weights, optimizer state, random state and counters, as safetensors and JSON.

A checkpoint is written under a temporary name, flushed to the disk and renamed; only then the one before it goes. So at any moment,
also after a kill or on a full disk, the last complete one is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from saccade.train.distributed import spread, whole

FOLDER = "checkpoints"


def gather_state(model: nn.Module, optimizers: Sequence[Optimizer], keep: bool = True) -> dict[str, Tensor]:
    """All tensors of a checkpoint on the CPU, shards put together: every process has to call this; those without `keep` get nothing."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> None:
        full = whole(tensor.detach())
        if keep:
            tensors[name] = full.cpu().contiguous()

    for name, tensor in _held(model).items():
        put(f"model.{name}", tensor)
    for i, optimizer in enumerate(optimizers):
        for slot, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                put(f"optimizer.{i}.{slot}.{name}", value)
    put("random.cpu", torch.get_rng_state())
    if torch.cuda.is_available():
        put("random.cuda", torch.cuda.get_rng_state())
    return tensors


def write_checkpoint(out: Path, step: int, tensors: dict[str, Tensor], counters: dict[str, Any]) -> Path:
    """Write `out/checkpoints/<step>` under a temporary name, rename it, and remove the older ones.

    A complete checkpoint of the same step stays as it is. Raises ValueError, in one sentence, where it can't be written: the
    checkpoint before it is then still there.
    """
    folder = out / FOLDER / f"{step:08d}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "state.safetensors")
        (partial / "counters.json").write_text(json.dumps({"step": step, **counters}), encoding="utf-8")
        for file in (*partial.iterdir(), partial):
            _flush(file)
        os.replace(partial, folder)
        _flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = latest_checkpoint(out)
        kept = f"the last good one is {last}" if last is not None else "there is none before it"
        raise ValueError(f"the checkpoint of step {step} can't be written to {folder.parent} ({reason(error)}): free some space or "
                         f"choose another folder, and start again; {kept}") from error  # fmt: skip
    for other in folder.parent.iterdir():
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def save_checkpoint(
    out: Path, step: int, model: nn.Module, optimizers: Sequence[Optimizer], counters: dict[str, Any]
) -> Path:
    """`gather_state`, then `write_checkpoint`, by a single process or one of several with the same weights."""
    return write_checkpoint(out, step, gather_state(model, optimizers), counters)


def latest_checkpoint(out: Path) -> Path | None:
    """The folder of the last complete checkpoint under `out`, or None."""
    found = sorted(path for path in (out / FOLDER).glob("[0-9]*") if path.is_dir())
    return found[-1] if found else None


def read_counters(folder: Path) -> dict[str, Any]:
    """The counters of a checkpoint. Raises ValueError where they can't be read."""
    try:
        return json.loads((folder / "counters.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        raise ValueError(f"{folder} is no complete checkpoint: remove it, or choose another folder for the run") from None


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """Put a checkpoint into the model, the optimizers and torch's random generators; returns the counters.

    Sharded parameters take their own shards. Raises ValueError when the checkpoint is of another model or can't be read.
    """
    counters = read_counters(folder)
    try:
        tensors = load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the checkpoint {folder} can't be read ({reason(error)}): remove it, or choose another folder") from None
    own = _held(model)
    saved = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    if own.keys() != saved.keys() or any(own[name].shape != t.shape for name, t in saved.items()):
        raise ValueError(f"the checkpoint {folder} is of a model with other shapes; choose another output folder")
    with torch.no_grad():
        for name, t in saved.items():
            own[name].copy_(spread(t, own[name]))
    for i, optimizer in enumerate(optimizers):
        prefix = f"optimizer.{i}."
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for name, t in tensors.items():
            if name.startswith(prefix):
                slot, field = name.removeprefix(prefix).split(".", 1)
                state.setdefault(int(slot), {})[field] = spread(t, params[int(slot)])
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return counters


def reason(error: BaseException) -> str:
    """Why a file could not be written or read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    told = " ".join(str(error).split()) or type(error).__name__
    inner = re.search(r"I/O error: (.+?) \(os error", told)  # as safetensors puts what the system said
    return inner[1][0].lower() + inner[1][1:] if inner else told


def _held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters (each once, also where two share one) and the buffers that belong to the model's state."""
    lasting = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in lasting}}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
