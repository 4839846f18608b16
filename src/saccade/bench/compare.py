"""Two results of the same op: which rows got slower or faster by more than their spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """A row that changed: percent is the change in time, above 0 slower; None where it no longer runs."""

    family: str
    case: dict[str, Any]
    contestant: str
    ours: bool
    old_ms: float
    new_ms: float | None
    percent: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """changes: the largest slow-down first. same: rows within their spread. unmatched: rows that one side alone has."""

    changes: list[Change]
    same: int
    unmatched: int
    warnings: list[str]

    def slower_than(self, percent: float) -> list[Change]:
        """saccade's own rows that are slower by more than `percent`, or no longer run."""
        return [c for c in self.changes if c.ours and (c.percent is None or c.percent > percent)]


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Rows are matched by family, case and contestant; a row changed when the ranges of its times (20th to 80th percentile) no longer meet.

    Raises ValueError where the results are of different ops.
    """
    if old["op"] != new["op"]:
        raise ValueError(f"the old result is of {old['op']} and the new one of {new['op']}: compare results of one op")
    before = {_key(row): row for row in old["rows"] if row["status"] == "ok" and row["ms"]}
    after = {_key(row): row for row in new["rows"]}
    changes, same = [], 0
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        common: dict[str, Any] = {"family": b["family"], "case": b["case"], "contestant": b["contestant"], "ours": b["role"] == "ours"}
        if b["status"] == "failed":
            changes.append(Change(**common, old_ms=a["ms"], new_ms=None, percent=None, note=b["note"]))
        elif b["ms"]:
            (low_a, high_a), (low_b, high_b) = _range(a), _range(b)
            if low_b > high_a or high_b < low_a:
                changes.append(Change(**common, old_ms=a["ms"], new_ms=b["ms"], percent=100 * (b["ms"] / a["ms"] - 1)))
            else:
                same += 1
    changes.sort(key=lambda c: (c.percent is not None, -(c.percent or 0.0), c.family, c.contestant))
    timed = {key for key, row in after.items() if row["ms"]}
    broken = {key for key in before.keys() & after.keys() if after[key]["status"] == "failed"}
    return Comparison(
        changes=changes, same=same, unmatched=len((before.keys() ^ timed) - broken), warnings=_differences(old, new)
    )


def _range(row: dict[str, Any]) -> tuple[float, float]:
    return (row["ms"] if row["ms_low"] is None else row["ms_low"]), (row["ms"] if row["ms_high"] is None else row["ms_high"])


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["family"], tuple(sorted(row["case"].items(), key=str)), row["contestant"]


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else is different: times of two machines don't compare."""
    found = []
    named = [("environment", name) for name in ("device_name", "torch", "triton", "threads")]
    named += [("settings", "dtype"), ("settings", "impl")]
    for part, name in named:
        a, b = (x.get(part, {}).get(name) for x in (old, new))
        if a != b:
            found.append(f"{name.replace('_', ' ')} was {a} and is {b}")
    return found
