"""Curves as one HTML file: lines drawn as SVG by hand, small enough to be written again at every checkpoint.

The page needs no library, no script and no other file, and follows the reader's light or dark setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from saccade.core.files import atomic_write

Point = tuple[float, float]

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
MOST_POINTS = 600  # of a line: more than this many are averaged in groups
MARKED = 40  # points of a line that are few enough to mark each
_COLOURS = 8
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e22; --muted: #5c626c; --line: #e2e4e8;
 --c0: #1681dd; --c1: #df7a18; --c2: #0f6243; --c3: #942789; --c4: #76590b; --c5: #8027ef; --c6: #0b2195; --c7: #5d1709; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e7e9ec; --muted: #a2a9b4; --line: #33373d;
 --c0: #8faff8; --c1: #c99236; --c2: #46db95; --c3: #cc33a3; --c4: #dbd149; --c5: #9a6bf5; --c6: #4473d9; --c7: #b9664f; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
 font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--muted); font-size: 12px; }
.grid { stroke: var(--line); } path { fill: none; stroke-width: 1.8; } circle { stroke: none; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; list-style: none; }
.legend svg { width: 2rem; height: .8rem; margin-right: .4rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
td, th { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
 text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1.2rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; } .muted { color: var(--muted); }
"""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines over one axis. lines: name to points; x, y: what the axes show. low, high: the range of y, else that of the points."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[Point]]
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_curve(rows: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], path: Path) -> Path:
    """The page of a training run: its loss, what its evaluations measured, its learning rate, and the recipe."""
    measures = list(dict.fromkeys(key for row in rows for key in row if key.startswith("eval ")))

    def line(key: str) -> list[Point]:
        return [(row["step"], row[key]) for row in rows if key in row]

    charts = [Chart(title="Loss", x="step", y="nats a target", lines={"training": line("loss"), "evaluation": line("eval loss")})]
    shares = [key for key in measures if key != "eval loss" and all(0 <= y <= 1 for _, y in line(key))]
    others = [key for key in measures if key != "eval loss" and key not in shares]
    if shares:
        lines = {key.removeprefix("eval "): line(key) for key in shares}
        charts.append(Chart(title="Evaluation", x="step", y="share", lines=lines, low=0.0, high=1.0))
    charts += [Chart(title=key.removeprefix("eval ").capitalize(), x="step", y=key, lines={key: line(key)}) for key in others]
    charts.append(Chart(title="Learning rate", x="step", y="rate", lines={"rate": line("rate")}))
    examined = [row for row in rows if "eval loss" in row]
    table = Table(
        title="Evaluations", header=["step", *(key.removeprefix("eval ") for key in measures)],
        rows=[[str(row["step"]), *(f"{row[key]:.4f}" if key in row else "" for key in measures)] for row in examined],
    )  # fmt: skip
    last = rows[-1] if rows else {"step": 0, "seconds": 0.0, "tokens": 0}
    facts = {"steps": f"{last['step']:,}", "tokens": f"{last['tokens']:,}", "seconds": f"{last['seconds']:,}"}
    facts |= {key: _told(value) for key, value in recipe.items() if value not in (None, "", {})}
    return write_page(path, "Training run", facts, charts, [table] if examined else [])


def write_page(path: Path, title: str, facts: Mapping[str, str], charts: Sequence[Chart], tables: Sequence[Table] = ()) -> Path:
    """Write a page of charts, tables and facts to `path`, at once or not at all; returns the path. ValueError where it can't be."""
    body = [f"<h1>{escape(title)}</h1>"]
    body += [_chart(chart) for chart in charts]
    body += [_table(table) for table in tables]
    body.append("<h2>Facts</h2><dl>")
    body += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items()]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>saccade: {escape(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "</dl></body></html>\n"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(inner)}" for key, inner in value.items() if inner not in (None, {}))
    return "[" + ", ".join(map(_told, value)) + "]" if isinstance(value, list) else str(value)


def _chart(chart: Chart) -> str:
    lines = {name: _thinned([p for p in points if math.isfinite(p[1])]) for name, points in chart.lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return f"<h2>{escape(chart.title)}</h2><p class=muted>Nothing was measured yet.</p>"
    xs, ys = [x for points in lines.values() for x, _ in points], [y for points in lines.values() for _, y in points]
    x_ticks = _ticks(min(xs), max(xs))
    y_ticks = _ticks(min(ys) if chart.low is None else chart.low, max(ys) if chart.high is None else chart.high)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def spot(x: float, y: float) -> str:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM):.1f}"

    parts = []
    for tick in y_ticks:
        at = spot(x_low, tick).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at}" dy="4" text-anchor="end">{tick:.4g}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            at = spot(tick, y_low).split(",")[0]
            parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:,.4g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(chart.x)}</text>')
    parts.append(f'<text x="4" y="{HEIGHT - 6}">{escape(chart.y)}</text>')
    parts += [
        f'<path {_look(i)} d="M{"L".join(spot(*p) for p in points)}"><title>{escape(name)}, last {points[-1][1]:.4g}</title></path>'
        for i, (name, points) in enumerate(lines.items())
    ]
    parts += [
        f'<circle cx="{x}" cy="{y}" r="3" fill="var(--c{i % _COLOURS})"/>'
        for i, points in enumerate(lines.values()) if len(points) <= MARKED
        for x, y in (spot(*point).split(",") for point in points)
    ]  # fmt: skip
    keys = "".join(
        f'<li><svg viewBox="0 0 32 12" aria-hidden="true"><path {_look(i)} d="M0,6L32,6"/></svg>{escape(name)}</li>'
        for i, name in enumerate(lines)
    )
    ends = "; ".join(f"{name} ends at {points[-1][1]:.4g}" for name, points in lines.items())
    return (
        f'<h2>{escape(chart.title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{chart.title}: {ends}")}">'
        f'{"".join(parts)}</svg><ul class="legend">{keys}</ul>'
    )


def _look(i: int) -> str:
    """Colours first, then the same ones dashed: no two of sixteen lines look alike."""
    dash = ("", ' stroke-dasharray="7 4"', ' stroke-dasharray="2 3"')[i // _COLOURS % 3]
    return f'style="stroke: var(--c{i % _COLOURS})"{dash}'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f'<h2>{escape(table.title)}</h2><div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _thinned(points: Sequence[Point]) -> list[Point]:
    group = math.ceil(len(points) / MOST_POINTS)
    if group <= 1:
        return list(points)
    parts = [points[i : i + group] for i in range(0, len(points), group)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about five."""
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all the same: that value stands in the middle
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    span = high - low
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step + 1e-9)
    return [step * i for i in range(first, math.ceil(high / step - 1e-9) + 1)]
