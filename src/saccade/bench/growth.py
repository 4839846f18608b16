"""Growth: how the time of a contestant grows with the length, as an exponent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def exponent(lengths: Sequence[float], times: Sequence[float]) -> float | None:
    """The slope of log time over log length, by least squares; None with fewer than two lengths."""
    if len(set(lengths)) < 2:
        return None
    x, y = [math.log(n) for n in lengths], [math.log(t) for t in times]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def growth(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each contestant and set of cases that differ in "n" alone, where there are at least two lengths:
    family, case (without n), contestant, lengths, exponent (time ~ N ^ exponent)."""
    groups: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    shapes: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["status"] != "ok" or not row["ms"] or not row["case"].get("n"):
            continue
        rest = {key: value for key, value in row["case"].items() if key != "n"}
        key = (row["family"], tuple(sorted(rest.items(), key=str)), row["contestant"])
        groups.setdefault(key, []).append((row["case"]["n"], row["ms"]))
        shapes[key] = rest
    found = []
    for key, points in groups.items():
        points.sort()
        slope = exponent(*zip(*points, strict=True))
        if slope is not None:
            found.append(
                {"family": key[0], "case": shapes[key], "contestant": key[2], "lengths": [n for n, _ in points], "exponent": slope}
            )
    return found
