"""The comparison in plain words: what came near dense, what failed, whether anything was truly faster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from saccade.report.view import Chart, Point, Row, View

NEAR = 0.05
"""A method is near dense when it loses at most this share of dense's mean score."""

FASTER = 1.05
"""A method is faster than dense from this ratio on: two runs of the same code differ by a few per cent."""


class Name(str):
    """A name within a sentence, set in code type."""


@dataclass(frozen=True)
class Finding:
    """One sentence or two. `kind`: "good", "bad" or "note"; `parts` are plain text and Names, in reading order."""

    kind: str
    parts: tuple[str | Name, ...]

    @property
    def text(self) -> str:
        return "".join(self.parts)


def findings(view: View, mode: str) -> list[Finding]:
    """The sentences about one mode, most important first."""
    chart = view.charts[mode]
    rows = [row for row in view.rows if row["mode"] == mode]
    found = [*_quality(chart), *_speed(chart, rows), *_floor(chart), *_failures(rows), *_undiscriminating(rows)]
    return found


def score_text(value: float, unit: str) -> str:
    return f"{value:.3f} bits" if unit == "bits" else f"{value:.2f}"


def _dense(chart: Chart) -> Point | None:
    return next((point for point in chart.points if point.slug == "dense" and point.score is not None), None)


def _near(score: float, dense: float, unit: str) -> bool:
    return score <= dense * (1 + NEAR) if unit == "bits" else score >= dense * (1 - NEAR)


def _rivals(chart: Chart) -> list[Point]:
    """What competes: complete points that are neither the ceiling nor the floor."""
    return [p for p in chart.points if p.slug not in ("dense", "random") and p.complete and p.score is not None]


def _cache(point: Point) -> float:
    """The point's share of the dense cache; NaN, which no comparison holds for, where it was not measured."""
    share = point.costs["cache"]
    return float("nan") if share is None else share


def _quality(chart: Chart) -> Iterable[Finding]:
    dense = _dense(chart)
    if dense is None or dense.score is None:
        yield Finding(
            "note",
            ("No task here is one that dense attention solves, or dense was not run: nothing to compare scores with.",),
        )
        return
    unit, ceiling = chart.unit, dense.score
    small = [p for p in _rivals(chart) if _cache(p) < 0.98]
    if not small:
        yield Finding(
            "note", ("No method that ran in every cell held less than the dense cache: nothing here saves memory.",)
        )
        return
    near = [p for p in small if p.score is not None and _near(p.score, ceiling, unit)]
    if near:
        best = min(near, key=lambda p: (_cache(p), (p.score or 0.0) * (1 if unit == "bits" else -1)))
        yield Finding(
            "good",
            (
                "Smallest cache near dense: ",
                Name(best.method),
                f" scores {score_text(best.score or 0.0, unit)} where dense scores {score_text(ceiling, unit)}, "
                f"and holds {_cache(best):.0%} of the dense cache.",
            ),
        )
    else:
        best = (min if unit == "bits" else max)(small, key=lambda p: p.score or 0.0)
        yield Finding(
            "bad",
            (
                f"No smaller cache stays within {NEAR:.0%} of dense ({score_text(ceiling, unit)}). Nearest: ",
                Name(best.method),
                f" with {score_text(best.score or 0.0, unit)} at {_cache(best):.0%} of the dense cache.",
            ),
        )


def _speed(chart: Chart, rows: Sequence[Row]) -> Iterable[Finding]:
    measured = {"in prefill": _speedups(rows, "prefill_speedup"), "in decoding": _speedups(rows, "decode_speedup")}
    measured = {phase: speedups for phase, speedups in measured.items() if speedups}
    if not measured:
        yield Finding("note", ("Speed against dense was not measured.",))
        return
    best = {phase: _fastest(chart, speedups) for phase, speedups in measured.items()}
    if not any(best.values()):
        phases = "neither in prefill nor in decoding" if len(measured) == 2 else "".join(measured)
        top = max(ratio for speedups in measured.values() for ratio in speedups.values())
        told = f"No method was faster than dense at these lengths, {phases} (best ratio {top:.2f})."
        yield Finding("bad", (told,))
        return
    for phase, found in best.items():
        if found is None:
            yield Finding("bad", (f"No method was faster than dense at these lengths {phase}.",))
            continue
        method, length, ratio = found
        verdict = _verdict(chart, method, length)
        kind = "note" if verdict.startswith(", not") else "good"
        told = f", {ratio:.2f} times dense at {length:,} tokens{verdict}."
        yield Finding(kind, (f"Fastest {phase}: ", Name(method), told))


def _speedups(rows: Sequence[Row], key: str) -> dict[tuple[str, int], float]:
    """The median speedup over tasks, by method and length, of everything but dense and the floor."""
    gathered: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row["slug"] not in ("dense", "random") and row["status"] == "ok" and row[key] is not None:
            gathered.setdefault((row["method"], row["length"]), []).append(row[key])
    return {place: median(values) for place, values in gathered.items()}


def _fastest(chart: Chart, speedups: dict[tuple[str, int], float]) -> tuple[str, int, float] | None:
    """The fastest of those faster than dense; one that is near dense in quality where it is fast goes first."""
    fast = [(method, length, ratio) for (method, length), ratio in speedups.items() if ratio >= FASTER]
    return max(fast, key=lambda item: (_verdict(chart, item[0], item[1]).startswith(", near"), item[2]), default=None)


def _verdict(chart: Chart, method: str, length: int) -> str:
    """How good the method is at the length where it is fast: a speed means nothing without it."""
    here = {"dense" if p.slug == "dense" else p.method: p for p in chart.by_length if p.length == length}
    own, dense = here.get(method), here.get("dense")
    if own is None or dense is None or own.score is None or dense.score is None:
        return ""
    near = "near dense" if _near(own.score, dense.score, chart.unit) else "not near dense"
    return f", {near} in quality ({score_text(own.score, chart.unit)} against {score_text(dense.score, chart.unit)})"


def _floor(chart: Chart) -> Iterable[Finding]:
    """Methods that random eviction with no larger cache equals or beats."""
    sign = -1.0 if chart.unit == "bits" else 1.0
    floors = [(_cache(p), sign * (p.score or 0.0)) for p in chart.points if p.slug == "random" and p.complete]
    beaten = [
        p
        for p in _rivals(chart)
        if any(cache <= _cache(p) * 1.02 and floor >= sign * (p.score or 0.0) for cache, floor in floors)
    ]
    if beaten:
        verb = "is" if len(beaten) == 1 else "are"
        yield Finding(
            "bad",
            (
                *_names([p.method for p in beaten]),
                f" {verb} no better than evicting at random with a cache of that size or smaller.",
            ),
        )


def _failures(rows: Sequence[Row]) -> Iterable[Finding]:
    failed = [row for row in rows if row["status"] == "failed"]
    if not failed:
        yield Finding("good", ("The one cell ran." if len(rows) == 1 else f"All {len(rows)} cells ran.",))
        return
    methods = list(dict.fromkeys(row["method"] for row in failed))
    first = failed[0]
    yield Finding(
        "bad",
        (
            f"{len(failed)} of {len(rows)} cells failed, in ",
            *_names(methods),
            f". First: {first['task']} at {first['length']:,} tokens: ",
            _sentence(first["error"] or "no reason was recorded"),
        ),
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _undiscriminating(rows: Sequence[Row]) -> Iterable[Finding]:
    lengths: dict[str, set[int]] = {}
    for row in rows:
        if not row["discriminating"]:
            lengths.setdefault(row["task"], set()).add(row["length"])
    if lengths:
        told = "; ".join(f"{task} at {', '.join(f'{n:,}' for n in sorted(found))}" for task, found in lengths.items())
        yield Finding("note", (f"Left out of every mean, because dense itself fails there: {told}.",))


def _names(methods: Sequence[str]) -> list[str | Name]:
    """ "a", "a and b", "a, b and c"; from the fifth on only their number."""
    shown, rest = list(methods[:4]), len(methods) - 4
    parts: list[str | Name] = []
    for i, method in enumerate(shown):
        if i:
            parts.append(" and " if i == len(shown) - 1 and rest <= 0 else ", ")
        parts.append(Name(method))
    return [*parts, f" and {rest} more"] if rest > 0 else parts
