"""The study of recall: several lists of layers, trained alike on multi-query associative recall, and how much each can look up.

The same data in the same order, the same optimizer and the same number of steps for everyone: only the layers differ. Every contestant
trains in a folder of its own, so a study that was cut off goes on where it stopped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from saccade.core.files import atomic_write
from saccade.core.spec import split_top_level
from saccade.train.curve import Chart, Table, write_page
from saccade.train.loop import train
from saccade.train.metrics import FILE, read_rows
from saccade.train.models import build_model
from saccade.train.recipe import Evaluation, Precision, Recipe, Rule, Schedule
from saccade.train.sets import build_set

SCHEMA = "saccade.study-recall/1"
SOLVED = 0.95  # an accuracy from which on the task counts as solved
LLAMA = "llama"  # a contestant of its own: the transformer of the transformers library, for comparison
CONTESTANTS = (
    "softmax", "lightning-attention", "deltanet", "kimi-linear(gate='token')", "kimi-linear", "based",
    "lightning-attention*3,softmax", "deltanet*3,softmax", "kimi-linear*3,softmax",
)  # fmt: skip
_TIMES = re.compile(r"(.+?)\s*\*\s*(\d+)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class RecallSettings:
    """What all contestants share. length, pairs, vocab: of the task; fewest: pairs of the easiest training batches. depth, dim, heads: of
    the models. steps, batch, rate, warmup: of the training. evaluations: how often accuracy is measured, each time on `samples` batches.
    """

    length: int = 256
    pairs: int = 32
    fewest: int = 1
    vocab: int = 128
    depth: int = 4
    dim: int = 64
    heads: int = 2
    steps: int = 600
    batch: int = 8
    rate: float = 1e-2
    warmup: int = 40
    evaluations: int = 12
    samples: int = 8
    seed: int = 0
    precision: Precision = "float32"


def parse_contestant(text: str, depth: int) -> list[str]:
    """The layers that a contestant names: specs with commas between, `spec*3` for three alike, the whole repeated up to `depth`.

    "deltanet*3,softmax" at depth 8 is three deltanet layers and a softmax layer, twice. Raises ValueError where the list does not fit.
    """
    layers: list[str] = []
    for part in split_top_level(text, ","):
        match = _TIMES.fullmatch(part)
        spec, count = (match[1], int(match[2])) if match else (part, 1)
        layers += [spec] * count
    if not layers or depth % len(layers):
        raise ValueError(f"the contestant {text!r} lists {len(layers)} layers, which do not repeat evenly to a depth of {depth}")
    return layers * (depth // len(layers))


def describe(text: str, settings: RecallSettings) -> dict[str, Any]:
    """What `build_model` takes for a contestant."""
    layers = parse_contestant(text, settings.depth)
    shape = {
        "hidden_size": settings.dim, "intermediate_size": 2 * settings.dim, "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.heads, "max_position_embeddings": settings.length,
    }  # fmt: skip
    return {"architecture": "llama", **shape} if text == LLAMA else {"layers": layers, **shape}


def recipe_for(text: str, settings: RecallSettings, device: str | None = None) -> Recipe:
    """The training of one contestant."""
    every = max(1, settings.steps // settings.evaluations)
    fewest = min(settings.fewest, settings.pairs)
    data = {"set": "mqar", "length": settings.length, "pairs": settings.pairs, "vocab": settings.vocab, "fewest": fewest}
    return Recipe(
        model=describe(text, settings),
        data=data,
        optimizer=Rule(name="muon", rate=settings.rate, weight_decay=0.01),
        schedule=Schedule(name="cosine", warmup=settings.warmup, final=0.05),
        evaluate=Evaluation(every=every, batches=settings.samples, data={"fewest": settings.pairs}),
        steps=settings.steps,
        batch=settings.batch,
        precision=settings.precision,
        checkpoint=every,
        log=max(1, settings.steps // 100),
        seed=settings.seed,
        device=device,  # type: ignore[arg-type]
    )


def run_study(
    contestants: Sequence[str], settings: RecallSettings, out: str | Path, device: str | None = None, command: str = "",
    progress: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train all contestants, or go on where a study in `out` stopped; the result of schema SCHEMA, also written as `out/study.json`.

    `progress` is called with a contestant and each row of its metrics. Every contestant is built before the first one trains: raises
    ValueError or TypeError, in one sentence that names it, for one that can't be.
    """
    names = list(dict.fromkeys(contestants))
    if not names:
        raise ValueError("the study has no contestants: name at least one list of layers")
    sizes: dict[str, int] = {}
    recipes = {name: recipe_for(name, settings, device) for name in names}
    build_set(recipes[names[0]].data)  # what does not fit is said before anything is written
    for name in names:
        try:
            sizes[name] = build_model(recipes[name].model, settings.vocab).num_parameters()
        except (ValueError, TypeError) as error:
            raise type(error)(f"the contestant {name!r} can't be built: {error}") from None
    out = Path(out)
    rows = []
    for name in names:
        folder = out / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        result = train(recipes[name], folder, None if progress is None else lambda row, name=name: progress(name, row))
        curve = [[row["step"], row["eval accuracy"]] for row in read_rows(folder / FILE) if "eval accuracy" in row]
        rows.append({
            "contestant": name, "layers": parse_contestant(name, settings.depth), "parameters": sizes[name],
            "accuracy": result.scores["accuracy"], "loss": result.scores["loss"], "steps": result.steps,
            "seconds": round(result.seconds, 1), "solved_at": next((step for step, share in curve if share >= SOLVED), None),
            "curve": curve,
        })  # fmt: skip
    found = {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command,
        "environment": {"torch": torch.__version__, "device": _device_name(device), "threads": torch.get_num_threads()},
        "settings": asdict(settings), "rows": rows,
    }  # fmt: skip
    with atomic_write(out / "study.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


HEADER = ("layers", "accuracy", "loss", f"solved at ({SOLVED:.0%})", "parameters", "seconds")


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The table of a result as text, a row a contestant, the best first; its columns are HEADER."""
    return [
        [
            row["contestant"], f"{row['accuracy']:.3f}", f"{row['loss']:.3f}",
            "\N{EN DASH}" if row["solved_at"] is None else f"step {row['solved_at']:,}", f"{row['parameters']:,}", f"{row['seconds']:,}",
        ]
        for row in sorted(result["rows"], key=lambda row: -row["accuracy"])
    ]  # fmt: skip


def write_study_page(result: dict[str, Any], path: str | Path) -> Path:
    """The result as one HTML page: accuracy by step, the table, and what all shared."""
    settings = RecallSettings(**result["settings"])
    lines = {row["contestant"]: [(step, share) for step, share in row["curve"]] for row in result["rows"]}
    title = f"Associative recall: {settings.pairs} pairs in {settings.length} tokens"
    charts = [Chart(title="Accuracy", x="step", y="share of the queries answered", lines=lines, low=0.0, high=1.0)]
    tables = [Table(title="Contestants", header=HEADER, rows=table_rows(result))]
    facts = {"command": result["command"], **{key: str(value) for key, value in {**result["environment"], **result["settings"]}.items()}}
    return write_page(Path(path), title, facts, charts, tables)


def shrunk(settings: RecallSettings, **changes: Any) -> RecallSettings:
    """The settings with some of them changed; None leaves one as it is."""
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


def _device_name(device: str | None) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name()
