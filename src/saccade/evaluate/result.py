"""The result file of a comparison, schema "saccade.compare/1": rows, what they were measured on, saving and
resuming."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from saccade.core.files import atomic_write
from saccade.evaluate.contenders import Contender
from saccade.evaluate.decoding import Outcome
from saccade.evaluate.score import discriminating, summary
from saccade.evaluate.tasks import DepthTask, Task, spec_of

SCHEMA = "saccade.compare/1"
Key = tuple[str, str, int, str]


def key_of(row: dict[str, Any]) -> Key:
    """What identifies a row: method, task, length, mode."""
    return row["method"], row["task"], row["length"], row["mode"]


def environment(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Versions, device and dtype that a result was measured with."""
    device = next(model.parameters()).device
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def describe_model(model: transformers.PreTrainedModel, name: str) -> dict[str, Any]:
    """Name and shape of the (text part of the) model."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    return {
        "name": name,
        "layers": int(config.num_hidden_layers),
        "query_heads": heads,
        "kv_heads": int(getattr(config, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def command_of(
    model: str,
    methods: Sequence[str],
    tasks: Sequence[str],
    lengths: Sequence[int],
    settings: dict[str, Any],
    options: Sequence[str] = (),
) -> str:
    """The command line that runs these cells again; `options` are further arguments, such as "--dtype", "float16"."""
    words = ["saccade", "compare", "--model", model, "--methods", ";".join(methods), "--tasks", ",".join(tasks)]
    words += ["--lengths", ",".join(map(str, lengths))]
    for name in ("samples", "mode", "seed"):
        words += [f"--{name}", str(settings[name])]
    return shlex.join([*words, *options])


def blank_row(contender: Contender, task: Task, length: int, mode: str, command: str) -> dict[str, Any]:
    """A row with every key and nothing measured."""
    return {
        "method": contender.spec, "slug": contender.slug, "task": spec_of(task), "length": length, "mode": mode,
        "status": "failed", "error": None, "note": contender.note, "samples": 0,
        "score": None, "low": None, "high": None, "unit": task.unit, "discriminating": False,
        "scores": [], "depths": [],
        "prefill_density": None, "decode_density": None, "kv_bytes": None, "index_bytes": None, "kv_bytes_dense": None,
        "peak_bytes": None, "prefill_ms": None, "decode_ms": None, "first_step_ms": None,
        "prefill_speedup": None, "decode_speedup": None, "output_error": None, "mass": None, "command": command,
    }  # fmt: skip


def fill_row(
    row: dict[str, Any],
    task: Task,
    outcomes: Sequence[Outcome],
    depths: Sequence[Sequence[float]],
    peaks: Sequence[int | None],
    seed: int,
) -> None:
    """Put what the samples gave into a row: the mean score and its interval, medians of times and bytes.

    depths: of each sample's facts.
    """
    scores = [outcome.score for outcome in outcomes]
    row["score"], row["low"], row["high"] = summary(scores, bounded=task.unit == "accuracy", seed=seed)
    row |= {
        "status": "ok",
        "samples": len(scores),
        "scores": scores,
        "depths": by_depth(scores, depths) if isinstance(task, DepthTask) else [],
        "prefill_density": _mean(outcome.prefill_density for outcome in outcomes),
        "decode_density": _mean(outcome.decode_density for outcome in outcomes),
        "kv_bytes": _whole(outcome.kv_bytes for outcome in outcomes),
        "index_bytes": _whole(outcome.index_bytes for outcome in outcomes),
        "peak_bytes": _whole(peaks),
        "prefill_ms": _median(outcome.prefill_ms for outcome in outcomes),
        "decode_ms": _median(outcome.decode_ms for outcome in outcomes),
        "first_step_ms": _median(outcome.steps[0] if outcome.steps else None for outcome in outcomes),
    }


def relate(row: dict[str, Any], dense: dict[str, Any] | None, task: Task) -> None:
    """Fill in what a row says against the dense row of its cell: speedups, dense bytes, whether the task tells
    methods apart."""
    if dense is None or dense["status"] != "ok":
        return
    row["kv_bytes_dense"] = dense["kv_bytes"]
    row["discriminating"] = discriminating(dense["score"], task.unit, task.chance)
    if row["status"] == "ok":
        for phase in ("prefill", "decode"):
            own, other = row[f"{phase}_ms"], dense[f"{phase}_ms"]
            row[f"{phase}_speedup"] = other / own if own and other else None


def by_depth(scores: Sequence[float], depths: Sequence[Sequence[float]]) -> list[list[float]]:
    """`[depth, mean score]` by the depth of the first fact, ascending."""
    groups: dict[float, list[float]] = {}
    for score, places in zip(scores, depths, strict=True):
        groups.setdefault(places[0], []).append(score)
    return [[depth, sum(found) / len(found)] for depth, found in sorted(groups.items())]


def save(result: dict[str, Any], path: str | Path) -> None:
    """Write the file at once or not at all, a row a line; numbers that JSON has no word for become null."""
    clean = _finite(result)
    rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in clean.get("rows", []))
    head = json.dumps({**clean, "rows": []} if rows else clean, indent=1, allow_nan=False)
    text = head.replace('\n "rows": []', f'\n "rows": [\n{rows}\n ]', 1) if rows else head
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """Read a result file. Raises ValueError when it is missing, no JSON, or of another schema."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no result file at {path}: check the path, or make one with `saccade compare --json {path}`")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON: give a file that `saccade compare --json` wrote") from None
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path} is not a comparison of schema {SCHEMA!r}: give a file that this version's `saccade compare` wrote")
    return result


def check_resumable(old: dict[str, Any], new: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError unless the cells of `old` could stand in a file of `new`: same model, device, dtype and
    settings.

    Methods, tasks and lengths may differ: a resumed run adds the cells that are missing.
    """
    pairs = [
        *((name, old.get("settings", {}).get(name), new["settings"][name]) for name in ("samples", "mode", "seed", "text")),
        ("model", old.get("model"), new["model"]),
        *((name, old.get("environment", {}).get(name), new["environment"][name]) for name in ("device", "device_name", "dtype")),
    ]
    differ = [f"{name} {_short(before)} (now {_short(after)})" for name, before, after in pairs if before != after]
    if differ:
        raise ValueError(f"{path} was made with other settings, {', '.join(differ)}: use the same ones or another file")


def _short(value: Any) -> str:
    return repr(value.get("name")) if isinstance(value, dict) else repr(value)


def new_result(settings: dict[str, Any], model: dict[str, Any], env: dict[str, Any], command: str) -> dict[str, Any]:
    """A result without rows."""
    return {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command,
        "environment": env, "model": model, "settings": settings, "rows": [], "attention": None, "notes": [],
    }  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]


def _median(values: Any) -> float | None:
    known = _known(values)
    return median(known) if known else None


def _mean(values: Any) -> float | None:
    known = _known(values)
    return sum(known) / len(known) if known else None


def _whole(values: Any) -> int | None:
    found = _median(values)
    return None if found is None else round(found)


def _processor() -> str:
    """The CPU's name where the system tells it."""
    path = Path("/proc/cpuinfo")
    if os.access(path, os.R_OK):
        for line in path.read_text(errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
