"""compare: every method on every task and length, next to dense attention and random eviction, on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from saccade.core import Plan
from saccade.core.files import check_writable
from saccade.evaluate import result as results
from saccade.evaluate.cells import Spot, add_fidelity, draw, fidelity_of, note_lengths, prepared, run_cell, swept_heap
from saccade.evaluate.contenders import line_up
from saccade.evaluate.decoding import MODES
from saccade.evaluate.fidelity import LONGEST, Fidelity
from saccade.evaluate.prompts import Codec, check_length
from saccade.evaluate.tasks import Task, build, spec_of
from saccade.evaluate.text import grammar as text_grammar
from saccade.evaluate.throughput import STEPS, check_batches, measure_throughput


@dataclass(frozen=True)
class Progress:
    """What a run is doing. done, total: cells. sample, samples: inside the cell. doing: its method, task and length."""

    done: int
    total: int
    doing: str
    sample: int = 0
    samples: int = 0


def compare(
    model: PreTrainedModel,
    tokenizer: Any,
    methods: Sequence[str],
    tasks: Sequence[str | Task],
    lengths: Sequence[int],
    samples: int = 8,
    mode: str = "aware",
    seed: int = 0,
    json_path: str | Path | None = None,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    *,
    plans: Iterable[Plan] = (),
    floor: bool = True,
    text: str | Path | None = None,
    fidelity: bool = True,
    attention: bool = True,
    name: str | None = None,
    options: Sequence[str] = (),
    batches: Sequence[int] = (),
    steps: int = STEPS,
) -> dict[str, Any]:
    """Compare methods and return the result, a dict of schema "saccade.compare/1" (docs/compare-schema.md).

    methods: specs such as "snapkv(budget=0.25)" or "minference+snapkv"; dense always joins, and so does the
    random-eviction floor where some method works on the cache (unless `floor` is off). tasks: names or specs.
    lengths: prompt tokens.
    mode: "aware" compresses prompt and question together, "agnostic" the context before the question is seen.
    All methods see the same prompts, which depend on seed, task, length and index alone.

    json_path: saved there after every cell, whole at any time. resume: go on with that file: cells that are ok in it
    stay.
    plans: calibrations; a method that needs one and has none is calibrated once on the text. text: a file to make
    prompts of, in place of the shipped text. fidelity, attention: whether to measure errors by layer and draw one
    prompt's maps.
    name: the model's name in the result. options: arguments to repeat in the rows' commands.
    batches: batch sizes whose decoding speed is measured after the cells, over so many `steps`, into the result's
    "throughput"; with them `tasks` may be empty.

    A cell that fails is recorded with its reason and the rest goes on. Raises ValueError, before anything runs, on
    unknown methods or tasks, lengths below a task's minimum, numbers out of range and files that can't be written.
    """
    check_settings(tasks, lengths, samples, mode, batches, steps)
    spot = Spot(model, Codec(tokenizer), text_grammar(text), "agnostic" if mode == "agnostic" else "aware", seed, warmed=set())
    chosen = list({spec_of(task): task for task in map(build, tasks)}.values())
    lengths = sorted(set(lengths))
    for task in chosen:
        for length in lengths:
            check_length(task, spot.codec, spot.grammar, length)
        spot.prompt(task, lengths[-1], 0)  # the text may be too short for the longest
    line = line_up(methods, lengths, floor=floor)
    if resume and json_path is None:
        raise ValueError("there is no file to resume: give the one that the run writes (json_path, --json)")
    if json_path is not None:
        check_writable(json_path)

    settings = {
        "tasks": [spec_of(task) for task in chosen], "lengths": lengths, "samples": samples, "mode": mode, "seed": seed,
        "text": None if text is None else str(text), "methods": [contender.spec for contender in line],
    }  # fmt: skip
    if batches:
        settings |= {"batches": sorted(set(batches)), "steps": steps}
    label = name or str(getattr(model.config, "name_or_path", "") or type(model).__name__)

    def command(specs: Sequence[str], tasks: Sequence[str], lengths: Sequence[int]) -> str:
        return results.command_of(label, specs, tasks, lengths, settings, options)

    named = [contender.spec for contender in line if not contender.dense] or ["dense"]
    result = results.new_result(
        settings,
        results.describe_model(model, label),
        results.environment(model),
        command(named, settings["tasks"], lengths),
    )
    if resume and json_path is not None and Path(json_path).exists():
        _take_over(result, results.load(json_path), json_path)
    finished = {results.key_of(row) for row in result["rows"] if row["status"] == "ok"}
    cells = [(task, length, contender.spec) for task in chosen for length in lengths for contender in line]
    todo = {(spec_of(t), n, spec) for t, n, spec in cells if (spec, spec_of(t), n, mode) not in finished}
    done = len(cells) - len(todo)

    def tell(doing: str, sample: int = 0) -> None:
        if progress is not None:
            progress(Progress(done, len(cells), doing, sample, samples if sample else 0))

    with swept_heap():
        line = prepared(line, spot, plans, {one.spec for one in line} if batches else {spec for _, _, spec in todo}, tell)
        near: dict[tuple[str, int], dict[str, Fidelity]] = {}
        for task, length in ((task, length) for task in chosen for length in lengths):
            here = [contender for contender in line if (spec_of(task), length, contender.spec) in todo]
            prompts = [spot.prompt(task, length, index) for index in range(samples)] if here else []
            close = (spec_of(task), min(length, LONGEST))
            if here and fidelity and close not in near:
                tell(f"errors by layer, {close[0]} at {close[1]}")
                near[close] = fidelity_of(spot, task, close[1], [c for c in line if not c.broken])
            for contender in here:
                doing = f"{contender.spec}, {spec_of(task)} at {length}"
                tell(doing)
                again = command([contender.spec], [spec_of(task)], [length])
                row = results.blank_row(contender, task, length, mode, again)
                run_cell(row, spot, contender, task, prompts, lambda sample, doing=doing: tell(doing, sample))
                add_fidelity(row, near.get(close, {}).get(contender.spec))
                note_lengths(row, spot, prompts, length)
                _put(result, row, task)
                done += 1
                if json_path is not None:
                    results.save(result, json_path)
                tell(doing)
        if attention and chosen and (result["attention"] is None or todo):
            tell("attention maps")
            draw(result, spot, [contender for contender in line if not contender.broken])
        if batches:

            def keep(rows: list[dict[str, Any]]) -> None:
                result["throughput"] = rows
                if json_path is not None:
                    results.save(result, json_path)

            known = result.get("throughput", [])
            keep(measure_throughput(spot, line, lengths, batches, steps=steps, known=known, tell=tell, save=keep))
    if json_path is not None:
        results.save(result, json_path)
    return result


def check_settings(
    tasks: Sequence[str | Task], lengths: Sequence[int], samples: int, mode: str, batches: Sequence[int] = (), steps: int = STEPS
) -> None:
    """Raise ValueError for settings that no model could run."""
    check_batches(batches, steps)
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: use aware (the question is compressed too) or agnostic (it comes after)")
    for what, value in (("samples", samples), *(("each length", length) for length in lengths)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{what} must be a whole number of at least 1, not {value!r}")
    if not (tasks or batches) or not lengths:
        raise ValueError("nothing to run: give at least one task (or batch) and one length")
    for task in tasks:
        build(task)


def _take_over(result: dict[str, Any], old: dict[str, Any], path: str | Path) -> None:
    """Rows and maps of an earlier file move into `result`, when its settings allow it."""
    results.check_resumable(old, result, path)
    result["rows"] = list(old["rows"])
    result["attention"], result["notes"] = old.get("attention"), list(old.get("notes", []))
    result["created"] = old.get("created", result["created"])
    if "throughput" in old:
        result["throughput"] = list(old["throughput"])
    for name in ("tasks", "lengths", "methods"):
        before = old["settings"].get(name, [])
        result["settings"][name] = [*before, *(value for value in result["settings"][name] if value not in before)]


def _put(result: dict[str, Any], row: dict[str, Any], task: Task) -> None:
    """Add a row, in place of an earlier one of the same cell, and relate its group to the group's dense row."""
    rows = result["rows"]
    places = [i for i, old in enumerate(rows) if results.key_of(old) == results.key_of(row)]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    group = [other for other in rows if results.key_of(other)[1:] == results.key_of(row)[1:]]
    dense = next((other for other in group if other["method"] == "dense"), None)
    for other in group:
        results.relate(other, dense, task)
