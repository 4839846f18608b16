"""The tables and heat maps, as plain data for the template: they are HTML and need no script to be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saccade.report.palette import shade
from saccade.report.view import Row, View, mean, row_costs

DASH = "\N{EN DASH}"


def bytes_text(value: float | None) -> str:
    """Bytes with a binary unit: 1,234,567 is "1.18 MiB"."""
    if value is None:
        return DASH
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def number(pattern: str) -> Callable[[float | None], str]:
    return lambda value: DASH if value is None else pattern.format(value)


_percent, _ratio, _ms, _two, _three = map(number, ("{:.0%}", "{:.2f}\u00d7", "{:,.1f}", "{:.2f}", "{:.3f}"))


def length_text(value: int) -> str:
    """Token counts the short way: 4096 is "4K", 1000 is "1,000"."""
    return f"{value // 1024}K" if value >= 1024 and value % 1024 == 0 else f"{value:,}"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers: `value` sorts, `text` is read, `about` explains the header."""

    title: str
    about: str
    value: Callable[[Row], float | None]
    text: Callable[[float | None], str]


COLUMNS = (
    Column(
        title="Cache",
        about="Bytes of keys and values held, padding and codes included",
        value=lambda r: r["kv_bytes"],
        text=bytes_text,
    ),
    Column(
        title="Index",
        about="Bytes of the method's own index beside the cache",
        value=lambda r: r["index_bytes"],
        text=bytes_text,
    ),
    Column(
        title="Of dense",
        about="Cache and index over the bytes of the dense cache",
        value=lambda r: row_costs(r)["cache"],
        text=_percent,
    ),
    Column(
        title="Peak",
        about="Highest memory in use while the samples ran",
        value=lambda r: r["peak_bytes"],
        text=bytes_text,
    ),
    Column(
        title="Prefill density",
        about="Score pairs computed over pairs visible",
        value=lambda r: row_costs(r)["prefill_density"],
        text=_percent,
    ),
    Column(
        title="Decode density",
        about="Keys read over keys visible",
        value=lambda r: row_costs(r)["decode_density"],
        text=_percent,
    ),
    Column(title="Prefill ms", about="Median time of the whole prompt", value=lambda r: r["prefill_ms"], text=_ms),
    Column(
        title="Prefill \u00f7",
        about="Dense median over this median: above 1 is faster",
        value=lambda r: r["prefill_speedup"],
        text=_ratio,
    ),
    Column(title="Decode ms", about="Median time of one new token", value=lambda r: r["decode_ms"], text=_two),
    Column(
        title="Decode \u00f7",
        about="Dense median over this median: above 1 is faster",
        value=lambda r: r["decode_speedup"],
        text=_ratio,
    ),
    Column(
        title="Output error",
        about="Relative error of the attention output, mean over layers",
        value=lambda r: mean(r["output_error"] or ()),
        text=_three,
    ),
    Column(
        title="Mass",
        about="Attention mass covered, mean over layers",
        value=lambda r: mean(r["mass"] or ()),
        text=_three,
    ),
)


def table_rows(view: View) -> list[dict[str, Any]]:
    """One entry per row, in the result's order: what is shown and what sorts it."""
    shown = []
    for row in view.rows:
        values = [column.value(row) for column in COLUMNS]
        shown.append(
            {
                "row": row,
                "cells": [column.text(value) for column, value in zip(COLUMNS, values, strict=True)],
                "sort": [
                    view.methods.index(row["method"]),
                    row["task"],
                    row["length"],
                    row["mode"],
                    row["score"],
                    *values,
                ],
                "score": DASH
                if row["score"] is None
                else _three(row["score"])
                if row["unit"] == "bits"
                else _two(row["score"]),
                "interval": _interval(row),
            }
        )
    return shown


def _interval(row: Row) -> str:
    if row["low"] is None or row["high"] is None:
        return ""
    text = _three if row["unit"] == "bits" else _two
    return f"{text(row['low'])}{DASH}{text(row['high'])}"


def summary_rows(view: View, mode: str) -> list[dict[str, Any]]:
    """The chart as a table: one entry per method with its mean score and mean costs."""
    chart = view.charts[mode]
    text = {
        "cache": _percent,
        "decode_ms": _two,
        "prefill_ms": _ms,
        "prefill_density": _percent,
        "decode_density": _percent,
    }
    score = _three if chart.unit == "bits" else _two
    return [
        {
            "method": p.method,
            "score": score(p.score),
            "cells": f"{p.done} of {p.cells}",
            "costs": [text[name](p.costs[name]) for name in text],
        }
        for p in chart.points
    ]


def heat_maps(view: View) -> list[dict[str, Any]]:
    """Score by length and depth: for each mode and task, a table per method, its cells coloured."""
    found = []
    for mode in view.modes:
        for task in view.tasks:
            rows = [row for row in view.rows if row["mode"] == mode and row["task"] == task]
            if not any(row["depths"] for row in rows):
                continue
            depths = sorted({float(depth) for row in rows for depth, _ in row["depths"]})
            lengths = sorted({row["length"] for row in rows})
            maps = [
                {"method": method, "lines": _lines([row for row in rows if row["method"] == method], lengths, depths)}
                for method in view.methods
            ]
            shown = [entry for entry in maps if entry["lines"]]
            found.append(
                {"mode": mode, "task": task, "depths": [f"{depth:.0%}".rstrip("%") for depth in depths], "maps": shown}
            )
    return found


def _lines(rows: Sequence[Row], lengths: Sequence[int], depths: Sequence[float]) -> list[dict[str, Any]]:
    if not rows:
        return []
    lines = []
    for length in lengths:
        row = next((row for row in rows if row["length"] == length), None)
        scores = {float(depth): score for depth, score in row["depths"]} if row else {}
        failed = bool(row and row["status"] == "failed")
        lines.append(
            {"length": length_text(length), "failed": failed, "cells": [_cell(scores.get(depth)) for depth in depths]}
        )
    return lines


def _cell(score: float | None) -> dict[str, str]:
    if score is None:
        return {"text": DASH, "background": "", "ink": ""}
    background, ink = shade(score)
    return {"text": f"{100 * score:.0f}", "background": background, "ink": ink}
