"""The comparison page: a result of schema `saccade.compare/1` as one HTML file that needs no network, no other file."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saccade.core.files import atomic_write
from saccade.report import pack, palette, table
from saccade.report.result import read
from saccade.report.summary import Name, findings
from saccade.report.view import Row, View, build

_TEMPLATES = Path(__file__).parent / "templates"
_ROW_KEYS = (
    "method",
    "task",
    "length",
    "mode",
    "status",
    "score",
    "low",
    "high",
    "unit",
    "discriminating",
    "samples",
    "output_error",
    "mass",
)


def write_page(result: dict[str, Any], path: str | Path) -> Path:
    """Render `result` and write it to `path`, at once or not at all; returns the path.

    Raises TypeError or ValueError, in one sentence, on a result that is damaged or not of schema `saccade.compare/1`
    and on a place that can't be written; ImportError naming the extra where jinja2 or plotly is missing.
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
    view = build(clean["rows"])
    attention = pack.pack_attention(clean["attention"], view.methods)
    plotly, plotly_version = pack.plotly_script()

    def raw(name: str) -> Markup:
        return Markup((_TEMPLATES / name).read_text(encoding="utf-8"))

    def breakable(name: str) -> Markup:
        # A narrow column breaks a long spec where its parts meet, not within a word.
        return Markup("<wbr>").join(piece for piece in re.split(r"(?<=[,=])|(?=[(+])", name) if piece)

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["name"] = lambda part: isinstance(part, Name)
    environment.globals["raw"] = raw
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html").render(
        result=clean,
        view=view,
        palette=palette,
        findings={mode: findings(view, mode) for mode in view.modes},
        columns=table.COLUMNS,
        table_rows=table.table_rows(view),
        summaries={mode: table.summary_rows(view, mode) for mode in view.modes},
        heat_maps=table.heat_maps(view),
        scale=[palette.shade(i / 10)[0] for i in range(11)],
        modes=[(mode, mode or "unnamed") for mode in view.modes],
        lengths=[(length, table.length_text(length)) for length in view.lengths],
        attention=attention,
        plotly=plotly,
        plotly_version=plotly_version,
        data=Markup(pack.script_json(_page_data(view, attention))),
    )


def _page_data(view: View, attention: pack.Attention | None) -> dict[str, Any]:
    """What the page's scripts read."""
    return {
        "methods": [
            {"name": m, "slug": view.slugs[m], "css": view.looks[m].css, "marker": view.looks[m].marker}
            for m in view.methods
        ],
        "tasks": view.tasks,
        "lengths": view.lengths,
        "modes": view.modes,
        "charts": {mode: asdict(chart) for mode, chart in view.charts.items()},
        "rows": [_chart_row(row) for row in view.rows],
        "attention": attention.index if attention else None,
    }


def _chart_row(row: Row) -> dict[str, Any]:
    return {key: row.get(key) for key in _ROW_KEYS}
