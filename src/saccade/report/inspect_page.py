"""The page of every head: a result of schema `saccade.inspect/1` as one HTML file that needs no network, no other file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saccade.core.files import atomic_write
from saccade.evaluate.inspect import SCHEMA
from saccade.report import pack, palette
from saccade.report.result import finite
from saccade.report.table import number

_TEMPLATES = Path(__file__).parent / "templates"
RETRIEVES = 0.1  # a score from which the summary counts a head as one that retrieves
SINKS = 0.3

_two, _percent = number("{:.2f}"), number("{:.1%}")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of numbers; side: "least" or "most", what the filter asks of it, or empty."""

    at: int
    title: str
    about: str
    key: str
    text: Callable[[float | None], str] = _two
    side: str = ""
    number: bool = True


COLUMNS = (
    Column(at=0, title="Head", about="Layer and query head", key="order", number=False),
    Column(at=3, title="Sink", about="Mean attention mass on the first tokens", key="sink", side="least"),
    Column(at=4, title="Retrieval", about="Mean mass from a repeated n-gram to what followed it before", key="retrieval", side="least"),
    Column(at=5, title="Mass", about="Attention mass on what the method reads", key="mass", text=_percent, side="most"),
    Column(at=6, title="Density", about="Pairs read of pairs visible", key="density", text=_percent),
)


def write_page(result: dict[str, Any], path: str | Path) -> Path:
    """Render `result` and write it to `path`, at once or not at all; returns the path.

    Raises TypeError or ValueError, in one sentence, on what is no result of schema `saccade.inspect/1` and on a place that can't be
    written; ImportError naming the extra where jinja2 is missing.
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
        raise ImportError("the page needs jinja2: pip install 'saccade[report]'") from None

    clean = read(result)
    spec = clean["settings"].get("prefill")
    attention = pack.pack_attention(clean["attention"], [spec] if spec else [])
    assert attention is not None
    attention.index["list"] = True
    layers = attention.index["layers"]
    columns = [column for column in COLUMNS if spec or column.key not in ("mass", "density")]
    look = palette.looks([str(spec).partition("(")[0]])[0]
    measured = [layer["density"] for layer in clean["attention"]["layers"] if layer.get("density") is not None]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["raw"] = lambda name: Markup((_TEMPLATES / name).read_text(encoding="utf-8"))
    heads = scored(layers, spec)
    return environment.get_template("inspect.html").render(
        result=clean, palette=palette, spec=spec, attention=attention, columns=columns, layers=[layer["layer"] for layer in layers],
        findings=findings(heads, spec), source=mass_source(clean), rows=[_row(head, columns) for head in heads],
        measured=_percent(sum(measured) / len(measured)) if measured else None,
        data=Markup(pack.script_json({
            "methods": [{"name": spec, "slug": spec, "css": look.css, "marker": look.marker}] if spec else [],
            "modes": [""], "attention": attention.index,
        })),
    )  # fmt: skip


def read(result: Any) -> dict[str, Any]:
    """A checked copy; infinities and NaN come back as None. Raises TypeError or ValueError as `write_page`."""
    if not isinstance(result, dict):
        raise TypeError(f"an inspection's result is a dict, as read from its JSON file, not {type(result).__name__}")
    if result.get("schema") != SCHEMA:
        raise ValueError(f"the result has schema {result.get('schema')!r}, this page reads {SCHEMA!r}: run saccade inspect again")
    attention = result.get("attention")
    if not isinstance(attention, dict) or not attention.get("layers") or not attention.get("length"):
        raise ValueError("the result holds no heads: the file is damaged or was written by hand")
    clean = finite({key: value for key, value in result.items() if key != "attention"})
    for part in ("environment", "model", "settings"):
        clean[part] = {name: value for name, value in (clean.get(part) or {}).items() if value is not None}
    for part in ("created", "command"):
        clean[part] = str(clean.get(part) or "")
    return {**clean, "notes": clean.get("notes") or [], "attention": attention}


def scored(layers: list[dict[str, Any]], spec: str | None) -> list[dict[str, Any]]:
    """Every head as a flat row: where it is, its name, and its numbers (None where there is none), in the model's order."""
    heads: list[dict[str, Any]] = []
    for at, layer in enumerate(layers):
        for index, head in enumerate(layer["heads"]):
            heads.append({
                "at": at, "index": index, "layer": layer["layer"], "order": len(heads),
                "name": f"Layer {layer['layer']}, head {head['head']}", "sink": head.get("sink"), "retrieval": head.get("retrieval"),
                "mass": head["mass"].get(spec), "density": head["density"].get(spec),
            })  # fmt: skip
    return heads


def findings(heads: list[dict[str, Any]], spec: str | None) -> list[tuple[str, str]]:
    """(kind, sentence): which heads retrieve, which rest on the first tokens, what the method reads and misses."""
    found = [
        ("note", _strongest(heads, "retrieval", RETRIEVES, "retrieve")),
        ("note", _strongest(heads, "sink", SINKS, "rest on the first tokens")),
    ]
    known = [head for head in heads if head["mass"] is not None and head["density"] is not None]
    if spec and known:
        mass, density = (sum(head[key] for head in known) / len(known) for key in ("mass", "density"))
        least = min(known, key=lambda head: head["mass"])
        kind = "good" if least["mass"] >= 0.9 else "bad"
        found.append((
            kind,
            f"{spec} reads {density:.1%} of the pairs and covers {mass:.1%} of the attention mass, the mean over heads; "
            f"least in {_lower(least)}: {least['mass']:.1%} of the mass at {least['density']:.1%} of the pairs.",
        ))  # fmt: skip
    elif spec:
        found.append(("note", f"{spec} made no selection that can be drawn."))
    return found


def _strongest(heads: list[dict[str, Any]], key: str, limit: float, what: str) -> str:
    known = sorted((head for head in heads if head[key] is not None), key=lambda head: -head[key])
    if not known:
        return f"No head has a {key} score: no n-gram of this prompt comes twice."
    count = sum(head[key] >= limit for head in known)
    named = "; ".join(f"{_lower(head)} ({head[key]:.2f})" for head in known[: min(3, max(count, 1))])
    return f"{count} of {len(known)} heads {what} (score of at least {limit}); strongest: {named}."


def _lower(head: dict[str, Any]) -> str:
    return head["name"].lower()


def mass_source(result: dict[str, Any]) -> str:
    """How mass covered was found, in one sentence."""
    ways = {layer.get("mass_from") for layer in result["attention"]["layers"]}
    rows, length = result["settings"].get("rows"), result["attention"]["length"]
    exact = "Exact: the selection is made of whole tiles, whose probabilities were summed."
    if ways == {"tiles"}:
        return exact
    if rows is not None and rows >= length:
        return "Exact: from all rows."
    sampled = f"rom {rows} rows a layer, spread at random over the prompt, each of them exact."
    if ways == {"rows"}:
        return f"F{sampled}"
    return f"In layers whose selection is made of whole tiles exact, from the sums of those; in the others f{sampled}"


def _row(head: dict[str, Any], columns: list[Column]) -> dict[str, Any]:
    values = {column.at: head[column.key] for column in columns}
    shown = [column for column in columns if column.number]
    return {
        "at": head["at"], "head": head["index"], "layer": head["layer"], "name": head["name"],
        "sort": [values.get(at) for at in range(7)], "cells": [column.text(head[column.key]) for column in shown],
        "bars": [None if head[column.key] is None else round(head[column.key], 3) for column in shown],
    }  # fmt: skip
