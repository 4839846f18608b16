"""Studies: small models trained alike and compared, one after another or several side by side.

A contestant is a list of layers, a job one training run of it in a folder of its own. A job that has finished leaves `result.json` there
and is not run again; one that was cut off goes on from its checkpoint. So a study goes on by the same call, with the same settings.
Several workers are processes that share the device: a small model leaves most of a GPU idle, for its time goes into starting kernels.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch

from saccade.core.files import atomic_write
from saccade.core.spec import split_top_level
from saccade.train.loop import train
from saccade.train.metrics import FILE, read_rows
from saccade.train.models import build_model
from saccade.train.recipe import Evaluation, Precision, Recipe, Rule, Schedule
from saccade.train.sets.base import derive_seed

RESULT = "result.json"  # of a finished job
STUDY = "study.json"
SOLVED = 0.95  # an accuracy from which on a task counts as solved
_TIMES = re.compile(r"(.+?)\s*\*\s*(\d+)", re.DOTALL)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
DeviceName = Literal["cpu", "cuda"]
Row = dict[str, Any]
Progress = Callable[[str, Row], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run. name: of what is shown. folder: its own. measure: what its evaluations are about ("accuracy", "bits")."""

    name: str
    folder: Path
    recipe: Recipe
    measure: str = "accuracy"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of some jobs, by name. finished: the contents of their `result.json`: scores, loss, steps, seconds, curve. failed: a
    sentence each. missing: not started because the time was up."""

    finished: dict[str, Row]
    failed: dict[str, str]
    missing: list[str]


Finished = Callable[[str, Outcome], None]


class Training(Protocol):
    """What the trainings of all studies are told: rate, warmup (steps), sequences a step, evaluations, seed and precision."""

    @property
    def rate(self) -> float: ...
    @property
    def warmup(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def precision(self) -> Precision: ...


def alike(
    model: dict[str, Any], data: dict[str, Any], told: Training, *, steps: int, batches: int, exam: dict[str, Any],
    device: DeviceName | None,
) -> Recipe:  # fmt: skip
    """The training that every contestant of a study gets. batches, exam: of an evaluation, and how its data differs from `data`."""
    every = max(1, steps // told.evaluations)
    return Recipe(
        model=model, data=data, optimizer=Rule(name="muon", rate=told.rate, weight_decay=0.01),
        schedule=Schedule(name="cosine", warmup=told.warmup, final=0.05), evaluate=Evaluation(every=every, batches=batches, data=exam),
        steps=steps, batch=told.batch, precision=told.precision, checkpoint=every, log=max(1, steps // 100), seed=told.seed, device=device,
    )  # fmt: skip


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


def folder_name(name: str) -> str:
    """A contestant's name as that of a folder, different for different ones."""
    plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    return plain if re.fullmatch(r"[a-z0-9.,*-]+", name) else f"{plain}-{derive_seed(name) % 16**4:04x}"


def shrunk(settings: T, **changes: Any) -> T:
    """A dataclass of settings with some of them changed; None leaves one as it is."""
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


def solved_at(curve: Sequence[Sequence[float]]) -> int | None:
    """The first step of `[[step, accuracy], ...]` at which a task counts as solved."""
    return next((int(step) for step, share in curve if share >= SOLVED), None)


def count_parameters(names: Mapping[str, Mapping[str, Any]], vocabulary: int) -> dict[str, int]:
    """Parameters of every contestant's model. Raises ValueError or TypeError, which names it, for one that can't be built."""
    sizes = {}
    for name, description in names.items():
        try:
            sizes[name] = build_model(description, vocabulary).num_parameters()
        except (ValueError, TypeError) as error:
            raise type(error)(f"the contestant {name!r} can't be built: {error}") from None
    return sizes


def run_jobs(
    jobs: Sequence[Job], *, workers: int = 1, seconds: float | None = None, progress: Progress | None = None,
    finished: Finished | None = None,
) -> Outcome:  # fmt: skip
    """Run jobs in order, `workers` at a time; what has finished before is read.

    seconds: after so many no further job is started; those that run come to their end. progress: called with a job's name and each row of
    its metrics; finished: with the name of a job that has come to an end, and the outcome so far. A job that fails leaves a sentence, and
    the others go on.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    outcome = Outcome(finished={}, failed={}, missing=[])
    waiting: deque[Job] = deque()
    for job in jobs:
        before = read_result(job)
        if before is None:
            waiting.append(job)
        else:
            outcome.finished[job.name] = before
    end = None if seconds is None else time.monotonic() + seconds

    def keep(name: str, found: Row | str) -> None:
        if isinstance(found, str):
            outcome.failed[name] = found
        else:
            outcome.finished[name] = found
        if finished is not None:
            finished(name, outcome)

    def next_job() -> Job | None:
        return waiting.popleft() if waiting and (end is None or time.monotonic() < end) else None

    told = progress or (lambda name, row: None)
    if workers == 1:
        while (job := next_job()) is not None:
            keep(job.name, attempt(job, told))
    elif waiting:
        _side_by_side(min(workers, len(waiting)), next_job, told, keep)
    outcome.missing.extend(job.name for job in waiting)
    return outcome


def read_result(job: Job) -> Row | None:
    """What a finished job left, None where it has not finished or ran by another recipe."""
    path = job.folder / RESULT
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        raise ValueError(f"{path} can't be read as JSON: remove it, and the run beside it is looked at again") from None
    return found if found.get("recipe") == _lasting(job.recipe) else None


def attempt(job: Job, progress: Progress) -> Row | str:
    """Train a job and leave its result; the reason in a sentence where that fails."""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        done = train(job.recipe, job.folder, lambda row: progress(job.name, row))
        curve = [[row["step"], row[f"eval {job.measure}"]] for row in read_rows(job.folder / FILE) if f"eval {job.measure}" in row]
        found = {
            "scores": done.scores, "steps": done.steps, "seconds": round(done.seconds, 1), "curve": curve, "recipe": _lasting(job.recipe),
        }  # fmt: skip
        with atomic_write(job.folder / RESULT) as temporary:
            temporary.write_text(json.dumps(found) + "\n", encoding="utf-8")
    except Exception as error:  # one contestant's failure, of whatever kind, must not take the others with it
        said = " ".join(str(error).split())
        return said if said and isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {said}"
    return found


def _lasting(recipe: Recipe) -> Row:
    """The recipe as plain JSON data, without what changes no number, and without the place of the data."""
    whole = json.loads(json.dumps(asdict(recipe), default=str))
    whole["data"].pop("folder", None)
    return {key: value for key, value in whole.items() if key not in ("device", "threads", "compile", "checkpoint", "log")}


def _side_by_side(
    workers: int, next_job: Callable[[], Job | None], progress: Progress, keep: Callable[[str, Row | str], None]
) -> None:
    """Jobs in several processes. One that dies fails its job and is replaced."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    threads = max(1, torch.get_num_threads() // workers)
    running: dict[Connection, tuple[BaseProcess, Job]] = {}
    idle: list[tuple[Connection, BaseProcess]] = []
    try:
        while True:
            while len(running) < workers and (job := next_job()) is not None:
                line, process = idle.pop() if idle else _hire(context, threads)
                line.send(job)
                running[line] = process, job
            if not running:
                return
            for line in wait(list(running)):
                assert isinstance(line, Connection)
                process, job = running[line]
                try:
                    kind, told = line.recv()
                except (EOFError, OSError):
                    del running[line]
                    line.close()
                    process.join()
                    keep(job.name, f"its process ended with the code {process.exitcode} before it had finished")
                    continue
                if kind == "row":
                    progress(job.name, told)
                else:
                    del running[line]
                    idle.append((line, process))
                    keep(job.name, told)
    finally:
        # also when the study is broken off: what runs has its checkpoints
        for process in [process for process, _ in running.values()] + [process for _, process in idle]:
            process.terminate()
            process.join()


def _hire(context: Any, threads: int) -> tuple[Connection, BaseProcess]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, threads), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _work(line: Connection, threads: int) -> None:
    """A worker process: trains what it is sent, and tells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process decides what Ctrl-C means
    torch.set_num_threads(threads)
    while True:
        try:
            job = line.recv()
        except EOFError:
            return
        line.send(("end", attempt(job, lambda name, row: line.send(("row", row)))))


def open_study(out: str | Path, schema: str, settings: Any, command: str, device: str | None) -> Callable[..., Row]:
    """A function that writes `out/study.json`: `write(rows=..., ...)` returns the whole result.

    settings: a dataclass of what all contestants share; ValueError where the study in `out` has others, for its contestants would not
    have been trained alike, and where `out` is a file.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the study")
    path, shared = out / STUDY, json.loads(json.dumps(asdict(settings), default=str))
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            raise ValueError(f"{path} can't be read as JSON: remove it, or choose another folder") from None
        if before.get("schema") != schema:
            raise ValueError(f"{path} is of another kind of study ({before.get('schema')}): choose another folder")
        old = before["settings"]
        changed = next((key for key in shared if key in old and old[key] != shared[key]), None)
        if changed is not None:
            raise ValueError(
                f"the study in {out} was made with {changed} {old[changed]}, but {shared[changed]} was given now, and its contestants "
                "would not be trained alike: give the same settings, or another folder"
            )
    out.mkdir(parents=True, exist_ok=True)

    def write(**content: Any) -> Row:
        found = {
            "schema": schema, "created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command,
            "environment": {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads()},
            "settings": shared, **content,
        }  # fmt: skip
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return found

    if not path.is_file():
        write(rows=[], failed={}, missing=[])
    return write


def device_name(device: str | None) -> str:
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return torch.cuda.get_device_name()
