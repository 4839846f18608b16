"""What the comparison page draws, computed once, so that its words, charts and tables tell the same numbers.

A *cell* is a (task, length) pair. A method's mean score is taken over the cells where dense attention itself succeeds;
a method that failed in one of them has no fair mean, is drawn hollow and never stands on the frontier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from saccade.report.palette import Look, looks

Row = dict[str, Any]

COSTS = ("cache", "decode_ms", "prefill_ms", "prefill_density", "decode_density")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method's place in the chart, over all lengths (`length` None) or at one length.

    `score` in [0, 1], or bits per byte where the unit is "bits"; `costs` by the names in COSTS, None if not measured;
    `done` of `cells` cells have a score.
    """

    method: str
    slug: str
    length: int | None
    score: float | None
    costs: dict[str, float | None]
    done: int
    cells: int

    @property
    def complete(self) -> bool:
        return self.done == self.cells


@dataclass(frozen=True, kw_only=True)
class Chart:
    """The quality-versus-cost chart of a mode: points per method, points per length, the frontier for each cost."""

    unit: str
    points: list[Point]
    by_length: list[Point]
    frontier: dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class View:
    """Everything the template and the scripts need from a result's rows."""

    methods: list[str]
    slugs: dict[str, str]
    looks: dict[str, Look]
    tasks: list[str]
    lengths: list[int]
    modes: list[str]
    rows: list[Row]
    charts: dict[str, Chart] = field(default_factory=dict)


def build(rows: Sequence[Row]) -> View:
    """The view of rows that `report.result.read` has checked. Dense comes first, random last, the rest in order."""
    slugs = {row["method"]: row["slug"] for row in rows}
    rank = {"dense": 0, "random": 2}
    methods = sorted(slugs, key=lambda method: rank.get(slugs[method], 1))  # stable: ties stay in order of appearance
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    found = looks([slugs[method] for method in methods])
    return View(
        methods=methods,
        slugs=slugs,
        looks=dict(zip(methods, found, strict=True)),
        tasks=list(dict.fromkeys(row["task"] for row in rows)),
        lengths=sorted({row["length"] for row in rows}),
        modes=modes,
        rows=list(rows),
        charts={mode: _chart(methods, slugs, [row for row in rows if row["mode"] == mode]) for mode in modes},
    )


def _chart(methods: Sequence[str], slugs: dict[str, str], rows: list[Row]) -> Chart:
    # Bits and accuracies don't average: accuracies decide, bits only stand in where there is nothing else.
    units = {row["unit"] for row in rows if row["discriminating"]}
    unit = "bits" if units == {"bits"} else "accuracy"
    judged = [row for row in rows if row["discriminating"] and row["unit"] == unit]
    ran = [method for method in methods if any(row["method"] == method for row in rows)]
    points = [_point(method, slugs[method], None, judged) for method in ran]
    by_length = [
        _point(method, slugs[method], length, [row for row in judged if row["length"] == length])
        for method in ran
        for length in sorted({row["length"] for row in judged})
    ]
    frontier = {cost: pareto(points, cost, lower_is_better=unit == "bits") for cost in COSTS}
    return Chart(unit=unit, points=points, by_length=by_length, frontier=frontier)


def _point(method: str, slug: str, length: int | None, judged: list[Row]) -> Point:
    cells = {(row["task"], row["length"]) for row in judged}
    own = [row for row in judged if row["method"] == method and row["status"] == "ok" and row["score"] is not None]
    costs = [row_costs(row) for row in own]
    return Point(
        method=method,
        slug=slug,
        length=length,
        score=mean(row["score"] for row in own),
        # A cost missing in one cell is missing in the mean: means over different cells don't compare.
        costs={name: None if any(c[name] is None for c in costs) else mean(c[name] for c in costs) for name in COSTS},
        done=len({(row["task"], row["length"]) for row in own}),
        cells=len(cells),
    )


def row_costs(row: Row) -> dict[str, float | None]:
    """The costs of one row. "cache" is what the method holds, cache and index, over what the dense cache holds."""
    dense = row["kv_bytes_dense"]
    held = None if row["kv_bytes"] is None else row["kv_bytes"] + (row["index_bytes"] or 0)
    densities = {name: row[name] for name in ("prefill_density", "decode_density")}
    if row["slug"] == "dense":
        densities = {name: 1.0 if value is None else value for name, value in densities.items()}
    return {
        "cache": held / dense if held is not None and dense else None,
        "decode_ms": row["decode_ms"],
        "prefill_ms": row["prefill_ms"],
        **densities,
    }


def pareto(points: Sequence[Point], cost: str, *, lower_is_better: bool = False) -> list[str]:
    """Methods that no other beats in both score and cost, cheapest first; incomplete ones are left out."""
    sign = -1.0 if lower_is_better else 1.0
    known = [
        (p.costs[cost], sign * p.score, p.method)
        for p in points
        if p.complete and p.score is not None and p.costs[cost] is not None
    ]
    front: list[str] = []
    best = float("-inf")
    for _, score, method in sorted(known, key=lambda item: (item[0], -item[1])):
        if score > best:
            front.append(method)
            best = score
    return front


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are there, None if none is."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
