"""The tasks that methods are compared on: seeded, offline, one small file for each group."""

from __future__ import annotations

import difflib
from dataclasses import fields

from saccade.core.spec import format_spec, parse_spec, split_top_level
from saccade.evaluate.tasks.base import ANSWER_SLOT, DepthTask, Sample, Task
from saccade.evaluate.tasks.dictionary import Dictionary
from saccade.evaluate.tasks.facts import TwoFacts
from saccade.evaluate.tasks.needle import Needle, NeedleMultikey, NeedleMultiquery, NeedleMultivalue
from saccade.evaluate.tasks.passages import Copy, Text
from saccade.evaluate.tasks.variables import Variables
from saccade.evaluate.tasks.words import CommonWords, FrequentWords

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Needle,
        NeedleMultikey,
        NeedleMultivalue,
        NeedleMultiquery,
        Dictionary,
        Variables,
        CommonWords,
        FrequentWords,
        Copy,
        TwoFacts,
        Text,
    )
}


def build(spec: str | Task) -> Task:
    """The task that `spec` names, such as "needle" or "needle(depths=(0.5,))".

    Raises ValueError for an unknown name or setting, naming the nearest ones, and for a value out of range.
    """
    if isinstance(spec, Task):
        return spec
    try:
        name, settings = parse_spec(spec)
    except ValueError as error:
        raise ValueError(f"the task {spec!r} can't be read: write it like 'needle' or 'needle(depths=(0.5,))'") from error
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}: {_nearest(name, list(TASKS))}")
    known = [field.name for field in fields(TASKS[name])]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"task {name} has no setting {setting!r}: {_nearest(setting, known)}")
    return TASKS[name](**settings)


def spec_of(task: Task) -> str:
    """The shortest spec that builds `task`: its name and the settings that differ from the defaults."""
    changed = {f.name: getattr(task, f.name) for f in fields(task) if getattr(task, f.name) != f.default}
    return format_spec(task.name, changed)


def split(text: str) -> list[str]:
    """The specs in a comma-separated list; commas inside brackets belong to a spec."""
    return split_top_level(text, ",")


def _nearest(name: str, known: list[str]) -> str:
    if not known:
        return "it has none"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)}"


__all__ = ["ANSWER_SLOT", "TASKS", "DepthTask", "Sample", "Task", "build", "spec_of", "split"]
