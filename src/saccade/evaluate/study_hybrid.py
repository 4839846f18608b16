"""The study of hybrids: six linear mixers, each with some softmax layers among them, trained alike on recall and on text.

The experiment of the systematic analysis of hybrid linear attention at pocket scale. Every contestant is trained twice from the same
seed: on multi-query associative recall (measured: share of the queries answered), and on the bytes of the Python sources that ship with
the package (measured: bits per byte of the part held out). Data and their order, optimizer and steps are the same for all; only the
layers differ.

How a ratio r:1 maps to a small depth L: round(L / (r + 1)) of the layers are softmax, at least one, evenly spaced with the last one on
top: at the indices (j + 1) * L // m - 1 for j = 0 ... m - 1. Where L is a multiple of r + 1 these are the paper's, (i + 1) mod (r + 1)
= 0. At depth 12: 24:1 and 12:1 are one softmax layer, 6:1 two, 3:1 three, 1:1 six; at depth 24: one, two, three, six, twelve. Ratios that
come to the same model at a depth are trained once and share a column.

Source: hybrid-linear-analysis, arXiv 2507.06457.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core import MixerShape
from saccade.evaluate.study import (
    DeviceName,
    Finished,
    Job,
    Outcome,
    Progress,
    alike,
    count_parameters,
    open_study,
    run_jobs,
    solved_at,
)
from saccade.evaluate.text import SHIPPED
from saccade.methods.hybrid.hybrid_linear_analysis import KINDS, grid
from saccade.train.curve import Chart, Table, write_page
from saccade.train.recipe import Precision, Recipe
from saccade.train.sets import ByteText, build_set

SCHEMA = "saccade.study-hybrid/1"
RATIOS = ("pure", "24:1", "12:1", "6:1", "3:1", "1:1")
SOFTMAX = "softmax"
RECALL, TEXT = "recall", "text"


@dataclass(frozen=True, kw_only=True)
class HybridSettings:
    """What all contestants share. depth, dim, heads: of the models. length: tokens of a sequence of either task. pairs, fewest, vocab: of
    recall, as in `saccade.train.sets.Recall`. steps, text_steps: of the two trainings. batch, rate, warmup: of both. evaluations: how
    often each is measured, each time on `samples` batches, or all text that is held out if that is less. folder: of the text, `endings` of
    its files; `held_out` of it is not trained on.
    """

    depth: int = 12
    dim: int = 128
    heads: int = 4
    length: int = 256
    pairs: int = 32
    fewest: int = 1
    vocab: int = 128
    steps: int = 1500
    text_steps: int = 500
    batch: int = 64
    rate: float = 1e-2
    warmup: int = 50
    evaluations: int = 10
    samples: int = 4
    seed: int = 0
    precision: Precision = "float32"
    folder: str = ""
    endings: tuple[str, ...] = (".txt",)
    held_out: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """mixer: one of KINDS, or SOFTMAX. full: its softmax layers. ratios: the ratios that come to this model at this depth."""

    mixer: str
    full: int
    ratios: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.mixer}-{self.full}"

    def layers(self, depth: int) -> list[str]:
        """One mixer spec a layer."""
        places = full_places(self.full, depth)
        cheap = next((cell.spec for cell in grid(patterns=("pure",)) if cell.kind == self.mixer), SOFTMAX)
        return [SOFTMAX if index in places else cheap for index in range(depth)]


def full_layers(ratio: str, depth: int) -> int:
    """Softmax layers among `depth` at a ratio "r:1"; 0 for "pure"."""
    return 0 if ratio == "pure" else max(1, round(depth / (int(ratio.split(":")[0]) + 1)))


def full_places(full: int, depth: int) -> set[int]:
    """The indices of `full` softmax layers among `depth`."""
    return {(j + 1) * depth // full - 1 for j in range(full)}


def contestants(mixers: Sequence[str], ratios: Sequence[str], depth: int) -> list[Contestant]:
    """All softmax first, then ratio by ratio all mixers. ValueError for unknown mixers and ratios, and where there are none."""
    grid(mixers, ratios)
    if not mixers or not ratios:
        raise ValueError("the study has no contestants: name at least one mixer and one ratio")
    shared: dict[int, list[str]] = {}
    for ratio in dict.fromkeys(ratios):
        shared.setdefault(full_layers(ratio, depth), []).append(ratio)
    made = [Contestant(mixer=SOFTMAX, full=depth, ratios=("0:1",))]
    return made + [
        Contestant(mixer=mixer, full=full, ratios=tuple(names))
        for full, names in shared.items() if full < depth
        for mixer in dict.fromkeys(mixers)
    ]  # fmt: skip


def describe(one: Contestant, settings: HybridSettings) -> dict[str, Any]:
    """What `build_model` takes for a contestant."""
    return {
        "layers": one.layers(settings.depth), "hidden_size": settings.dim, "intermediate_size": 2 * settings.dim,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.heads, "max_position_embeddings": settings.length,
    }  # fmt: skip


def recipes_for(one: Contestant, settings: HybridSettings, device: DeviceName | None = None) -> dict[str, Recipe]:
    """The two trainings of a contestant, by RECALL and TEXT."""
    text = {
        "set": "bytes", "folder": settings.folder or str(SHIPPED.parent), "length": settings.length, "endings": list(settings.endings),
        "held_out": settings.held_out,
    }  # fmt: skip
    made = build_set(text)
    assert isinstance(made, ByteText)
    held = max(1, min(settings.samples, (made.windows - made.training_windows) // settings.batch))
    recall = {
        "set": "mqar", "length": settings.length, "pairs": settings.pairs, "vocab": settings.vocab,
        "fewest": min(settings.fewest, settings.pairs),
    }  # fmt: skip
    model, exam = describe(one, settings), {"fewest": settings.pairs}
    return {
        RECALL: alike(model, recall, settings, steps=settings.steps, batches=settings.samples, exam=exam, device=device),
        TEXT: alike(model, text, settings, steps=settings.text_steps, batches=held, exam={}, device=device),
    }


def run_hybrid_study(
    chosen: Sequence[Contestant], settings: HybridSettings, out: str | Path, device: DeviceName | None = None, command: str = "",
    progress: Progress | None = None, *, workers: int = 1, seconds: float | None = None, finished: Finished | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the contestants on both tasks, or go on where a study in `out` stopped; the result of schema SCHEMA, also `out/study.json`.

    workers, seconds, progress, finished: as in `saccade.evaluate.study.run_jobs`, told of jobs by "gla 3 of 12: recall". A contestant
    stands in the result as far as it has got; one whose training fails under "failed" with a sentence, those not started under "missing".
    ValueError or TypeError, in one sentence, before anything is written, for settings that don't fit.
    """
    # names are checked before anything is written
    build_set(recipes_for(chosen[0], settings)[RECALL].data)
    models = {name_of(one, settings): describe(one, settings) for one in chosen}
    sizes = count_parameters(models, settings.vocab)
    write = open_study(out, SCHEMA, settings, command, device)
    jobs = [
        Job(name=f"{name_of(one, settings)}: {task}", folder=Path(out) / one.key / task, recipe=recipe,
            measure="accuracy" if task == RECALL else "bits")
        for one in chosen for task, recipe in recipes_for(one, settings, device).items()
    ]  # fmt: skip

    def write_rows(outcome: Outcome) -> dict[str, Any]:
        rows = list(_rows(chosen, settings, sizes, outcome))
        return write(rows=rows, failed=outcome.failed, missing=outcome.missing)

    def after(name: str, outcome: Outcome) -> None:
        write_rows(outcome)
        if finished is not None:
            finished(name, outcome)

    return write_rows(run_jobs(jobs, workers=workers, seconds=seconds, progress=progress, finished=after))


def name_of(one: Contestant, settings: HybridSettings) -> str:
    """A contestant's name: its mixer, and how many layers are softmax."""
    return SOFTMAX if one.mixer == SOFTMAX else f"{one.mixer} {one.full} of {settings.depth}"


def _rows(
    chosen: Sequence[Contestant], settings: HybridSettings, sizes: dict[str, int], outcome: Outcome
) -> Iterator[dict[str, Any]]:
    for one in chosen:
        name = name_of(one, settings)
        recall, text = (outcome.finished.get(f"{name}: {task}") for task in (RECALL, TEXT))
        if recall is None and text is None:
            continue
        row = {
            "contestant": name, "mixer": one.mixer, "full": one.full, "ratios": list(one.ratios), "layers": one.layers(settings.depth),
            "parameters": sizes[name], "cache_share": one.full / settings.depth, "state_numbers": _state_numbers(one, settings),
            "recall": None, "text": None,
        }  # fmt: skip
        if recall is not None:
            row["recall"] = {
                "accuracy": recall["scores"]["accuracy"], "loss": recall["scores"]["loss"], "solved_at": solved_at(recall["curve"]),
                "steps": recall["steps"], "seconds": recall["seconds"], "curve": recall["curve"],
            }  # fmt: skip
        if text is not None:
            row["text"] = {
                "bits": text["scores"]["bits"], "accuracy": text["scores"]["accuracy"], "steps": text["steps"],
                "seconds": text["seconds"], "curve": text["curve"],
            }  # fmt: skip
        yield row


def _state_numbers(one: Contestant, settings: HybridSettings) -> int:
    """Numbers that the linear layers keep for a sequence of any length."""
    if one.mixer == SOFTMAX:
        return 0
    cell = next(cell for cell in grid(patterns=("pure",)) if cell.kind == one.mixer)
    return (settings.depth - one.full) * cell.state_numbers(MixerShape(dim=settings.dim, heads=settings.heads))


def tables(result: dict[str, Any]) -> list[Table]:
    """Recall and bits per byte: a row a mixer, a column a ratio, with the number of its softmax layers."""
    depth = result["settings"]["depth"]
    columns = sorted({(row["full"], ", ".join(row["ratios"])) for row in result["rows"]})
    header = ["mixer", *(f"{'softmax' if full == depth else ratios} ({full})" for full, ratios in columns)]
    found = {(row["mixer"], row["full"]): row for row in result["rows"]}
    mixers = [mixer for mixer in (*KINDS, SOFTMAX) if any(row["mixer"] == mixer for row in result["rows"])]

    def cell(mixer: str, full: int, task: str, measure: str) -> str:
        row = found.get((mixer, full))
        return "" if row is None or row[task] is None else f"{row[task][measure]:.3f}"

    def cells(task: str, measure: str) -> list[list[str]]:
        return [[mixer, *(cell(mixer, full, task, measure) for full, _ in columns)] for mixer in mixers]

    return [
        Table(title="Recall: share of the queries answered, by ratio and (softmax layers)", header=header, rows=cells(RECALL, "accuracy")),
        Table(title="Text: bits per byte held out, by ratio and (softmax layers)", header=header, rows=cells(TEXT, "bits")),
    ]


def write_hybrid_page(result: dict[str, Any], path: str | Path) -> Path:
    """The result as one HTML page: recall and bits by the number of softmax layers, both tables, every contestant, what all shared."""
    shared, rows = result["settings"], result["rows"]
    depth = shared["depth"]

    def lines(task: str, measure: str) -> dict[str, list[tuple[float, float]]]:
        return {
            mixer: sorted((row["full"], row[task][measure]) for row in rows if row["mixer"] in (mixer, SOFTMAX) and row[task])
            for mixer in KINDS if any(row["mixer"] == mixer for row in rows)
        }  # fmt: skip

    across = f"softmax layers of {depth}"
    charts = [
        Chart(title="Recall", x=across, y="share of the queries answered", lines=lines(RECALL, "accuracy"), low=0.0, high=1.0),
        Chart(title="Text", x=across, y="bits per byte", lines=lines(TEXT, "bits")),
    ]
    header = (
        "contestant", "ratios", "recall", "solved at", "bits per byte", "parameters", "share of a KV cache", "numbers of state",
        "seconds",
    )  # fmt: skip
    every = Table(title="Contestants", header=header, rows=[_cells(row) for row in rows])
    places = {str(full): sorted(full_places(full, depth)) for full in sorted({row["full"] for row in rows}) if 0 < full < depth}
    facts = {
        "ratios": f"r:1 at depth {depth} is round({depth} / (r + 1)) softmax layers, at least one, evenly spaced, the last one on top: "
        + "; ".join(f"{full} at {', '.join(map(str, at))}" for full, at in places.items()),
        "recall": f"{shared['pairs']} pairs in {shared['length']} tokens",
        "source": "hybrid-linear-analysis, arXiv 2507.06457",
        "command": result["command"], "missing": ", ".join(result["missing"]) or "none",
        **{f"failed: {name}": said for name, said in result["failed"].items()},
        **{key: str(value) for key, value in {**result["environment"], **shared}.items() if value != ""},
    }  # fmt: skip
    return write_page(Path(path), "Hybrids of linear attention and softmax", facts, charts, [*tables(result), every])


def _cells(row: dict[str, Any]) -> list[str]:
    none = "\N{EN DASH}"
    recall, text = row["recall"], row["text"]
    solved = recall and recall["solved_at"]
    return [
        row["contestant"], ", ".join(row["ratios"]), f"{recall['accuracy']:.3f}" if recall else none,
        none if solved is None else f"step {solved:,}", f"{text['bits']:.3f}" if text else none, f"{row['parameters']:,}",
        f"{row['cache_share']:.0%}", f"{row['state_numbers']:,}", f"{sum(part['seconds'] for part in (recall, text) if part):,.0f}",
    ]  # fmt: skip
