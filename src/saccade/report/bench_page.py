"""The benchmark page: a result of schema `saccade.bench/1` as one HTML file that needs no network, no other file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saccade.bench.result import read
from saccade.bench.table import case_text, length_text, ms_text, rate_text
from saccade.core.files import atomic_write
from saccade.report import pack, palette
from saccade.report.table import bytes_text, number

_TEMPLATES = Path(__file__).parent / "templates"
_KEYS = (
    "family", "contestant", "role", "ms", "ms_low", "ms_high", "selection_ms", "rate", "rate_unit", "ratio", "density", "intensity",
    "tflops",
)  # fmt: skip

_times, _share = number("{:.2f}\u00d7"), number("{:.2%}")

# title, what it says, the field that sorts it, how it reads
COLUMNS: tuple[tuple[str, str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("ms", "Median", "ms", lambda r: ms_text(r["ms"])),
    ("20-80%", "20th to 80th percentile of the times", "ms_low", lambda r: f"{ms_text(r['ms_low'])}\u2013{ms_text(r['ms_high'])}"),
    ("Choosing ms", "Choosing what to read, not part of ms", "selection_ms", lambda r: ms_text(r["selection_ms"])),
    ("Rate", "Least work over the median", "rate", lambda r: rate_text(r["rate"], r["rate_unit"])),
    ("\u00f7 dense", "Time of the best dense contestant over ms and choosing: above 1 is faster", "ratio", lambda r: _times(r["ratio"])),
    ("\u00f7 peer", "Time of the best peer over ms and choosing: above 1 is faster", "ratio_peer", lambda r: _times(r["ratio_peer"])),
    ("Density", "Pairs read of pairs visible", "density", lambda r: _share(r["density"])),
    ("Error", "Relative L2 on a slice against float64", "error", lambda r: "\u2013" if r["error"] is None else f"{r['error']:.1e}"),
    ("Allowed", "Twice the error of plain torch code in the same dtype", "allowed",
     lambda r: "\u2013" if r["allowed"] is None else f"{r['allowed']:.1e}"),
    ("First call ms", "Compiling included", "first_call_ms", lambda r: ms_text(r["first_call_ms"])),
    ("Peak", "Memory in use beyond what was there before a call", "peak_bytes", lambda r: bytes_text(r["peak_bytes"])),
)  # fmt: skip


def write_page(result: dict[str, Any], path: str | Path) -> Path:
    """Render `result` and write it to `path`, at once or not at all; returns the path.

    Raises TypeError or ValueError, in one sentence, on what is no result of schema `saccade.bench/1` and on a place that can't be
    written; ImportError naming the extra where jinja2 or plotly is missing.
    """
    page = render_page(result)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(path)


def render_page(result: dict[str, Any]) -> str:
    """The page as a string of HTML; see `write_page`."""
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ImportError("the report needs jinja2: pip install 'saccade[report]'") from None

    clean = read(result)
    rows = clean["rows"]
    contestants = _contestants(rows)
    looks = dict(zip(contestants, palette.looks(_slugs(contestants)), strict=True))
    measured = [_chart_row(row) for row in rows if row["status"] == "ok" and row["ms"]]
    plotly, plotly_version = pack.plotly_script()
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["raw"] = lambda name: Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
    ours = {row["contestant"] for row in rows if row["role"] == "ours"}
    return environment.get_template("bench.html").render(
        result=clean, palette=palette, contestants=contestants, looks=looks, findings=findings(clean),
        ceilings=_ceilings(clean["ceilings"]),
        density_series=_series(measured, "density_series", lambda group: any((row["density"] or 1) < 1 for row in group)),
        length_series=_series(measured, "length_series", lambda group: len({row["n"] for row in group}) > 1),
        roofline=any(row["intensity"] is not None and row["tflops"] is not None for row in measured),
        growth=[
            {
                **line, "case": case_text(line["case"]), "lengths": ", ".join(map(length_text, line["lengths"])),
                "exponent": f"{line['exponent']:.2f}",
            }
            for line in clean["growth"]
        ],
        families=list(dict.fromkeys(row["family"] for row in rows)),
        lengths=sorted({row["case"]["n"] for row in rows if "n" in row["case"]}),
        columns=[(title, about) for title, about, _, _ in COLUMNS],
        table=[_table_row(row, contestants) for row in rows],
        plotly=plotly, plotly_version=plotly_version,
        data=Markup(pack.script_json({
            "methods": [
                {"name": name, "slug": name, "css": looks[name].css, "marker": looks[name].marker, "ours": name in ours}
                for name in contestants
            ],
            "modes": [""], "rows": measured, "ceilings": {name: clean["ceilings"].get(name) for name in ("copy", "matmul")},
        })),
    )  # fmt: skip


def findings(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(kind, sentence): how saccade stands against dense, whether results are right, what did not run."""
    ours = [row for row in result["rows"] if row["role"] == "ours"]
    ratios = [row for row in ours if row["ratio"] is not None]
    found: list[tuple[str, str]] = []
    if ratios:
        best, worst = max(ratios, key=lambda row: row["ratio"]), min(ratios, key=lambda row: row["ratio"])
        found.append(("good" if best["ratio"] >= 1 else "bad", f"Best against dense: {_named(best)}, {best['ratio']:.2f} times as fast."))
        if worst is not best:
            found.append(("note", f"Worst against dense: {_named(worst)}, {worst['ratio']:.2f} times as fast."))
    checked = [row for row in ours if row["ok"] is not None]
    wrong = [row for row in checked if not row["ok"]]
    if wrong:
        found.append(("bad", f"{len(wrong)} of {len(checked)} checked results are further off than allowed, first {_named(wrong[0])}."))
    elif checked:
        found.append(("good", f"All {len(checked)} checked results are within what is allowed."))
    for status in ("failed", "skipped"):
        rows = [row for row in result["rows"] if row["status"] == status]
        if rows:
            first = rows[0]
            kind = "bad" if status == "failed" else "note"
            found.append((kind, f"{len(rows)} {'rows were' if len(rows) > 1 else 'row was'} {status}, first {first['contestant']} in "
                                f"{_named(first)}: {first['note'] or 'no reason was recorded'}."))  # fmt: skip
    return found


def _named(row: dict[str, Any]) -> str:
    return f"{row['family']} at {case_text(row['case'])}"


def _contestants(rows: list[dict[str, Any]]) -> list[str]:
    """saccade first, then by their first row."""
    rank = {"ours": 0, "dense": 1, "peer": 2}
    roles = {row["contestant"]: rank.get(row["role"], 2) for row in reversed(rows)}
    return sorted(dict.fromkeys(row["contestant"] for row in rows), key=lambda name: roles[name])


def _slugs(contestants: list[str]) -> list[str]:
    """The best-known dense kernel is drawn in ink, a plain copy in grey."""
    ink = next((name for name in ("cuDNN", "SDPA") if name in contestants), None)
    return ["dense" if name == ink else "random" if name == "copy" else name for name in contestants]


def _chart_row(row: dict[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in row["case"].items() if key not in ("n", "density", "selected")}
    n = row["case"].get("n")
    at = f"{row['family']}, {case_text(rest)}"
    fixed = {key: value for key, value in row["case"].items() if key != "n"}
    return {
        **{key: row[key] for key in _KEYS}, "n": n, "text": case_text(row["case"]),
        "density_series": at if n is None else f"{at}, N {length_text(n)}", "length_series": f"{row['family']}, {case_text(fixed)}",
    }  # fmt: skip


def _series(rows: list[dict[str, Any]], key: str, wanted: Callable[[list[dict[str, Any]]], bool]) -> list[tuple[str, str]]:
    """(value, text) of the choices of a chart, those with the most points first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    names = sorted((name for name, group in groups.items() if wanted(group)), key=lambda name: -len(groups[name]))
    return [(name, name) for name in names]


def _ceilings(found: dict[str, float | None]) -> str:
    parts = [f"{name} {rate_text(found[name], unit)}" for name, unit in (("copy", "TB/s"), ("matmul", "TFLOP/s")) if found.get(name)]
    return ", ".join(parts)


def _table_row(row: dict[str, Any], contestants: list[str]) -> dict[str, Any]:
    n = row["case"].get("n")
    numbers = [row[field] for _, _, field, _ in COLUMNS]
    return {
        "row": {**row, "case": {"n": "", **row["case"]}},
        "case": case_text(row["case"], without="n"),
        "n": "" if n is None else length_text(n),
        "cells": [text(row) for _, _, _, text in COLUMNS],
        "sort": [contestants.index(row["contestant"]), f"{row['family']} {case_text(row['case'])}", n, *numbers],
    }
