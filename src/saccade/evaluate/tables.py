"""The quality tables: every method at a few densities or budgets, on the same prompts as dense attention and random choice.

A table is a comparison (schema "saccade.compare/1") whose rows say more: "system" and "aim" (see `lineups`), "turns" (the mean score of
each question, where several are asked in a row), "host_bytes", "twin" (the method that reads as much at random) and "worse" (whether it
does worse than its twin where dense succeeds; None where nobody can tell). Prompts of a cell run as one batch: bytes are a row's share,
prefill_ms is the batch's time over its rows, decode_ms that of a step of the whole batch.
"""

from __future__ import annotations

import gc
import math
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import attach
from saccade.core.files import check_writable
from saccade.evaluate import result as results
from saccade.evaluate.cells import sentence, swept_heap
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.decoding import MODES, Mode
from saccade.evaluate.fidelity import measure
from saccade.evaluate.lineups import CACHE, PREFILL, Entry, entries
from saccade.evaluate.lockstep import Together, aligned_prompts, batches, check_task, run_together
from saccade.evaluate.memory import Peak
from saccade.evaluate.patience import within
from saccade.evaluate.planning import Plans
from saccade.evaluate.prompts import Codec, Prompt
from saccade.evaluate.score import summary
from saccade.evaluate.tasks import Task, spec_of
from saccade.evaluate.text import grammar as text_grammar
from saccade.evaluate.twins import judge, twin_of

KINDS = {"prefill": PREFILL, "cache": CACHE}
MULTI_TURN = "needle-multiquery(needles=2)"
# the most telling cells first: a table cut short holds every method there
CELLS: dict[str, tuple[tuple[str, Mode], ...]] = {
    "prefill": (
        ("needle", "aware"), ("needle-multikey", "aware"), ("dictionary", "aware"), ("text", "aware"), ("variables", "aware"),
    ),
    "cache": (
        ("needle", "aware"), (MULTI_TURN, "agnostic"), (MULTI_TURN, "aware"), ("needle", "agnostic"), ("text", "aware"),
        ("dictionary", "aware"), ("needle-multikey", "aware"), ("variables", "aware"),
    ),
}  # fmt: skip
STEP = {"prefill": 16, "cache": 1}  # tokens of an answer that are fed at once
AT_ONCE = 12  # methods whose layers are measured in one dense run
SAVE_EVERY = 3.0  # seconds


@dataclass(frozen=True)
class Cell:
    """A task at a length in a mode."""

    task: Task
    length: int
    mode: Mode

    @property
    def name(self) -> str:
        return f"{spec_of(self.task)} at {self.length}, {self.mode}"


class DeviceLost(RuntimeError):
    """The GPU answers no more."""


@dataclass
class _Run:
    """What the cells of one table share."""

    kind: str
    model: PreTrainedModel
    codec: Codec
    plans: Plans
    result: dict[str, Any]
    seed: int
    ends: float
    json_path: str | Path | None
    command: Callable[[str, Cell], str]
    patience: float | None
    warmed: set[str] = field(default_factory=set)
    saved: float = -math.inf

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.ends

    def found(self, spec: str, cell: Cell) -> dict[str, Any] | None:
        """The row of a cell, where it is ok."""
        key = (spec, spec_of(cell.task), cell.length, cell.mode)
        return next((row for row in self.result["rows"] if row["status"] == "ok" and results.key_of(row) == key), None)

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, in place of an earlier one of the same cell."""
        key = results.key_of(row)
        self.result["rows"] = [*(old for old in self.result["rows"] if results.key_of(old) != key), row]
        self.save()

    def save(self, now: bool = False) -> None:
        """Write the file, not more often than every few seconds: what is whole stays whole."""
        if self.json_path is not None and (now or time.perf_counter() - self.saved > SAVE_EVERY):
            results.save(self.result, self.json_path)
            self.saved = time.perf_counter()


def run_table(
    kind: str, model: PreTrainedModel, tokenizer: Any, *, lengths: Sequence[int], samples: int = 8, aims: Sequence[str] = (),
    systems: Sequence[str] = (), tasks: Sequence[str] = (), modes: Sequence[str] = (), seconds: float | None = None, seed: int = 0,
    json_path: str | Path | None = None, resume: bool = False, layers: bool = True, name: str = "pocket", options: Sequence[str] = (),
    patience: float | None = None, tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure the table `kind`, "prefill" or "cache", and return the result.

    aims, systems, tasks, modes: of all those it has, only these. seconds: stop before the next line once so much time has gone by; the
    result's "table" says what is missing, and `resume` goes on with the file. patience: seconds after which a line is given up. layers:
    measure errors and masses by layer too (prefill). A line that fails is recorded and the rest goes on. ValueError, before anything runs,
    for arguments that fit no table.
    """
    check_arguments(kind, lengths, samples, aims, systems, tasks, modes, seconds)
    if json_path is not None:
        check_writable(json_path)
    elif resume:
        raise ValueError("there is no file to resume: give the one that the table writes (json_path, --json)")
    began = time.perf_counter()
    lines = entries(KINDS[kind], aims, systems)
    cells = _cells(kind, sorted(set(lengths)), tasks, modes)
    settings = {
        "table": kind, "tasks": list(dict.fromkeys(spec_of(cell.task) for cell in cells)), "lengths": sorted(set(lengths)),
        "samples": samples, "batch": samples, "mode": "each row's own", "seed": seed, "text": None, "budgets": list(aims),
        "systems": list(systems), "methods": [],
    }  # fmt: skip

    def command(spec: str, cell: Cell) -> str:
        return results.command_of(name, [spec], [spec_of(cell.task)], [cell.length], {**settings, "mode": cell.mode}, options)

    words = ["saccade", "table", kind, "--model", name, "--lengths", ",".join(map(str, settings["lengths"])), "--samples", str(samples)]
    only = (("budgets", aims), ("methods", systems), ("tasks", tasks), ("modes", modes))
    words += [word for option, chosen in only if chosen for word in (f"--{option}", ",".join(chosen))]
    words += ["--no-layers"] * (not layers) + ["--seed", str(seed)] * bool(seed)
    result = results.new_result(settings, results.describe_model(model, name), results.environment(model), shlex.join([*words, *options]))
    if resume and json_path is not None and Path(json_path).exists():
        old = results.load(json_path)
        results.check_resumable(old, result, json_path)
        result["rows"], result["created"] = list(old["rows"]), old.get("created", result["created"])
    codec = Codec(tokenizer)
    run = _Run(
        kind, model, codec, Plans(model, codec, text_grammar(None), seed), result, seed,
        math.inf if seconds is None else began + seconds, json_path, command, patience,
    )  # fmt: skip
    missing: list[str] = []
    try:
        with swept_heap():
            for place, cell in enumerate(cells):
                missing += _run_cell(run, cell, lines, samples, tell)
                if layers and kind == "prefill" and not place:
                    missing += _measure_layers(run, cell, lines, tell)
    except DeviceLost as problem:
        result["notes"].append(f"the device was lost: {problem}")
        missing.append("everything after that: run again with --resume")
    finally:
        judge(result["rows"])
        result["table"] = {"kind": kind, "seconds": round(time.perf_counter() - began, 1), "missing": missing}
        run.save(now=True)
    return result


def check_arguments(
    kind: str, lengths: Sequence[int], samples: int, aims: Sequence[str], systems: Sequence[str], tasks: Sequence[str],
    modes: Sequence[str], seconds: float | None,
) -> None:  # fmt: skip
    """Raise ValueError for arguments that fit no table."""
    if kind not in KINDS:
        raise ValueError(f"there is no table {kind!r}: choose {' or '.join(KINDS)}")
    if not lengths or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in lengths):
        raise ValueError(f"lengths {list(lengths)!r} are not whole numbers of tokens: give at least one")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a whole number of at least 1, not {samples!r}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds!r} is no time: give a number above 0")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is unknown: use aware or agnostic")
    for task in tasks:
        check_task(task)
    entries(KINDS[kind], aims, systems)
    if not _cells(kind, list(lengths), tasks, modes):
        raise ValueError(f"the table {kind} has no cell with these tasks and modes: leave one of them out")


def _cells(kind: str, lengths: list[int], tasks: Sequence[str], modes: Sequence[str]) -> list[Cell]:
    """The cells in the order of their worth: early tasks and short prompts first, in turn."""
    wanted = [spec_of(check_task(task)) for task in tasks]
    own: list[tuple[Task, Mode]] = [(check_task(task), mode) for task, mode in CELLS[kind]]
    known = [spec_of(task) for task, _ in own]
    more: list[tuple[Task, Mode]] = [(check_task(task), "aware") for task in wanted if task not in known]
    own.extend(more)
    kept = [one for one in own if (not wanted or spec_of(one[0]) in wanted) and (not modes or one[1] in modes)]
    grid = [(i + j, j, Cell(task, length, mode)) for i, (task, mode) in enumerate(kept) for j, length in enumerate(lengths)]
    return [cell for *_, cell in sorted(grid, key=lambda one: one[:2])]


def _run_cell(run: _Run, cell: Cell, lines: list[Entry], samples: int, tell: Callable[[str], None]) -> list[str]:
    """Run what the cell lacks; the sentences that say what is missing when the time is over."""
    groups: list[list[Prompt]] = []

    def line(entry: Entry | None, spec: str) -> dict[str, Any]:
        """The row of a spec, run if there is none yet."""
        known = run.found(spec, cell)
        if known is not None:
            return known
        if not groups:
            prompts = aligned_prompts(cell.task, run.codec, run.plans.grammar, length=cell.length, seed=run.seed, samples=samples)
            groups.extend(batches(prompts))
        tell(f"{cell.name}: {spec}")
        row = _row(run, cell, spec, entry, groups)
        run.put(row)
        return row

    if run.over:
        return [f"{cell.name}: everything"]
    dense = line(None, "dense")
    left = [entry for entry in lines if run.found(entry.spec(cell.length), cell) is None]
    for place, entry in enumerate(lines):
        if run.over and entry in left:
            names = ", ".join(f"{one.system} {one.aim}" for one in lines[place:] if one in left)
            return [f"{cell.name}: {names}"]
        row = line(entry, entry.spec(cell.length))
        results.relate(row, dense, cell.task)
        if row["status"] == "ok":
            row["twin"] = twin_of(run.kind, row, contender(row["method"]))
            if row["twin"] is not None:
                results.relate(line(None, row["twin"]), dense, cell.task)
    results.relate(dense, dense, cell.task)
    judge([row for row in run.result["rows"] if results.key_of(row)[1:] == results.key_of(dense)[1:]])
    return []


def _row(run: _Run, cell: Cell, spec: str, entry: Entry | None, groups: list[list[Prompt]]) -> dict[str, Any]:
    """Run one line of a cell; a failure is written into its row."""
    found, problem = None, None
    try:
        found = contender(spec)
    except ValueError as error:
        problem = sentence(error)
    shown = found or Contender(spec, spec.partition("(")[0], {})
    row = results.blank_row(shown, cell.task, cell.length, cell.mode, run.command(shown.spec, cell))
    row |= {
        "method": spec, "system": entry.system if entry else shown.slug, "aim": entry.aim if entry else None, "turns": [],
        "host_bytes": None, "twin": None, "worse": None,
    }  # fmt: skip
    if found is not None:
        try:
            plans = run.plans.of(found, cell.length)
            methods: dict[str, Any] = dict(found.methods)
            with within(run.patience), attach(run.model, **methods, plan=plans, seed=run.seed) if methods else nullcontext() as session:
                if run.plans.device.type == "cuda" and found.slug not in run.warmed:
                    # kernels compile when they first run
                    run_together(run.model, run.codec, groups[0], cell.mode, session, step=STEP[run.kind])
                    run.warmed.add(found.slug)
                meter, outcomes, peaks = Peak(run.plans.device), [], []
                for group in groups:
                    gc.collect()
                    meter.start()
                    outcomes.append(run_together(run.model, run.codec, group, cell.mode, session, step=STEP[run.kind]))
                    peak = meter.stop()
                    peaks.append(None if peak is None else peak // len(group))
            _fill(row, cell, outcomes, groups, peaks, run.seed)
        except Exception as error:  # the other lines go on
            problem = sentence(error)
    if problem is not None:
        row["error"] = problem
        _recover(run.plans.device, problem)
    return row


def _fill(
    row: dict[str, Any], cell: Cell, outcomes: list[Together], groups: list[list[Prompt]], peaks: list[int | None], seed: int
) -> None:
    by_turn = [scores for outcome in outcomes for scores in outcome.scores]
    scores = [sum(one) / len(one) for one in by_turn]
    row["score"], row["low"], row["high"] = summary(scores, bounded=cell.task.unit == "accuracy", seed=seed)
    depths = [prompt.sample.depths for group in groups for prompt in group]
    first, sizes = outcomes[0], [len(group) for group in groups]
    row |= {
        "status": "ok", "samples": len(scores), "scores": scores,
        "turns": [sum(turn) / len(turn) for turn in zip(*by_turn, strict=True)] if len(by_turn[0]) > 1 else [],
        "depths": results.by_depth(scores, depths) if all(depths) and cell.task.name.startswith(("needle", "dict")) else [],
        "prefill_density": first.prefill_density, "decode_density": first.decode_density,
        "kv_bytes": first.kv_bytes, "index_bytes": first.index_bytes, "host_bytes": first.host_bytes, "peak_bytes": peaks[0],
        "prefill_ms": sum(outcome.prefill_ms for outcome in outcomes) / sum(sizes), "decode_ms": first.decode_ms,
        "first_step_ms": first.steps[0] if first.steps else None,
    }  # fmt: skip


def _measure_layers(run: _Run, cell: Cell, lines: list[Entry], tell: Callable[[str], None]) -> list[str]:
    """Errors and masses by layer of the cell's methods, on its first prompt."""
    prompt = aligned_prompts(cell.task, run.codec, run.plans.grammar, length=cell.length, seed=run.seed, samples=1)[0]
    ids = [*prompt.context, *prompt.question]
    rows = [row for row in run.result["rows"] if results.key_of(row)[1:] == (spec_of(cell.task), cell.length, cell.mode)]
    rows = [row for row in rows if row["status"] == "ok" and row["method"] != "dense" and row["output_error"] is None]
    for begin in range(0, len(rows), AT_ONCE):
        some = rows[begin : begin + AT_ONCE]
        if run.over:
            return [f"errors by layer: {', '.join(row['method'] for row in rows[begin:])}"]
        tell(f"errors by layer: {begin} of {len(rows)}")
        try:
            ready = [replace(found := contender(row["method"]), plans=run.plans.of(found, cell.length)) for row in some]
            answer = run.codec.encode(prompt.sample.answers[0])
            near = measure(run.model, [*ids, *answer], len(ids), ready)
        except Exception as error:
            return [f"errors by layer: {sentence(error)}"]
        for row, one in zip(some, ready, strict=True):
            close = near[one.spec]
            if close.broken:
                row["note"] = f"no errors by layer: {close.broken}"
            else:
                row["output_error"], row["mass"] = close.output_error, close.mass
        run.save()
    return []


def _recover(device: torch.device, problem: str) -> None:
    """Give memory back after a failure; DeviceLost where the GPU went with it."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            raise DeviceLost(problem) from None
