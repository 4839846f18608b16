"""The study of recall: several lists of layers, trained alike on multi-query associative recall, and how much each can look up.

The same data in the same order, the same optimizer and the same number of steps for everyone: only the layers differ. Every contestant
trains in a folder of its own, so a study that was cut off goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.evaluate.study import (
    SOLVED,
    DeviceName,
    Finished,
    Job,
    Outcome,
    Progress,
    alike,
    count_parameters,
    folder_name,
    open_study,
    parse_contestant,
    run_jobs,
    solved_at,
)  # fmt: skip
from saccade.train.curve import Chart, Table, write_page
from saccade.train.recipe import Precision, Recipe
from saccade.train.sets import build_set

SCHEMA = "saccade.study-recall/1"
LLAMA = "llama"  # a contestant of its own: the transformer of the transformers library, for comparison
CONTESTANTS = (
    "softmax", "lightning-attention", "deltanet", "kimi-linear(gate='token')", "kimi-linear",
    "based(part='conv'),based",  # the linear part alone has no positions, so no layer could tell which value follows a key
    # with slopes of the paper its first layers see the newest tokens only, so a value knows the key before it, which softmax needs to look
    # it up; the slow ones of the released models tell two heads nothing of the order
    "lightning-attention(slopes='linear')*3,softmax", "deltanet*3,softmax", "kimi-linear*3,softmax",
)  # fmt: skip


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


def describe(text: str, settings: RecallSettings) -> dict[str, Any]:
    """What `build_model` takes for a contestant."""
    layers = parse_contestant(text, settings.depth)
    shape = {
        "hidden_size": settings.dim, "intermediate_size": 2 * settings.dim, "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.heads, "max_position_embeddings": settings.length,
    }  # fmt: skip
    return {"architecture": "llama", **shape} if text == LLAMA else {"layers": layers, **shape}


def recipe_for(text: str, settings: RecallSettings, device: DeviceName | None = None) -> Recipe:
    """The training of one contestant."""
    fewest = min(settings.fewest, settings.pairs)
    data = {"set": "mqar", "length": settings.length, "pairs": settings.pairs, "vocab": settings.vocab, "fewest": fewest}
    return alike(
        describe(text, settings), data, settings, steps=settings.steps, batches=settings.samples, exam={"fewest": settings.pairs},
        device=device,
    )  # fmt: skip


def run_study(
    contestants: Sequence[str], settings: RecallSettings, out: str | Path, device: DeviceName | None = None, command: str = "",
    progress: Progress | None = None, *, workers: int = 1, seconds: float | None = None, finished: Finished | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train all contestants, or go on where a study in `out` stopped; the result of schema SCHEMA, also written as `out/study.json`.

    workers, seconds, progress, finished: as in `saccade.evaluate.study.run_jobs`; contestants are told by name. Every contestant is built
    before the first one trains: raises ValueError or TypeError, in one sentence that names it, for one that can't be. One whose training
    fails stands under "failed" with a sentence, and those not started under "missing".
    """
    names = list(dict.fromkeys(contestants))
    if not names:
        raise ValueError("the study has no contestants: name at least one list of layers")
    recipes = {name: recipe_for(name, settings, device) for name in names}
    build_set(recipes[names[0]].data)  # what does not fit is said before anything is written
    sizes = count_parameters({name: describe(name, settings) for name in names}, settings.vocab)
    write = open_study(out, SCHEMA, settings, command, device)
    jobs = [Job(name=name, folder=Path(out) / folder_name(name), recipe=recipes[name]) for name in names]

    def write_rows(outcome: Outcome) -> dict[str, Any]:
        rows = [
            {
                "contestant": name, "layers": parse_contestant(name, settings.depth), "parameters": sizes[name],
                "accuracy": found["scores"]["accuracy"], "loss": found["scores"]["loss"], "steps": found["steps"],
                "seconds": found["seconds"], "solved_at": solved_at(found["curve"]), "curve": found["curve"],
            }
            for name in names if (found := outcome.finished.get(name)) is not None
        ]  # fmt: skip
        return write(rows=rows, failed=outcome.failed, missing=outcome.missing)

    def after(name: str, outcome: Outcome) -> None:
        write_rows(outcome)
        if finished is not None:
            finished(name, outcome)

    return write_rows(run_jobs(jobs, workers=workers, seconds=seconds, progress=progress, finished=after))


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
