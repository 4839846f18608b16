"""A quality table as lines of cells, for a terminal and for a Markdown file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from saccade.evaluate.twins import worse_than_random

Grid = tuple[list[str], list[list[str]]]  # header, lines


def grids(result: dict[str, Any]) -> list[tuple[str, Grid]]:
    """One grid for each length: a line for each method and aim, a column for each task and mode."""
    found = []
    for length in sorted({row["length"] for row in result["rows"]}):
        rows = [row for row in result["rows"] if row["length"] == length]
        make = _prefill if result["settings"]["table"] == "prefill" else _cache
        found.append((f"{length:,} tokens", make(rows)))
    return found


def layers_grid(result: dict[str, Any]) -> Grid | None:
    """Errors and masses by layer; None where none were measured."""
    rows = [row for row in result["rows"] if row["status"] == "ok" and row["output_error"]]
    if not rows:
        return None
    layers = range(len(rows[0]["output_error"]))
    header = ["method", *(f"{what} {layer}" for what in ("error", "mass") for layer in layers)]
    lines = [[f"`{row['method']}`", *(f"{x:.2f}" for x in (*row["output_error"], *row["mass"]))] for row in rows]
    return header, lines


def failures(result: dict[str, Any]) -> list[str]:
    """One sentence for each method that failed, with how many cells it is about."""
    told: dict[tuple[str, str], int] = {}
    for row in result["rows"]:
        if row["status"] == "failed":
            key = (row["method"], row["error"] or "no reason")
            told[key] = told.get(key, 0) + 1
    return [f"{method}: {error}" + (f" ({count} cells)" if count > 1 else "") for (method, error), count in told.items()]


def text(result: dict[str, Any]) -> str:
    """The Markdown file: tables, what does worse than random choice, what failed, what is missing, and how it was made."""
    env, model, settings = result["environment"], result["model"], result["settings"]
    kind = {"prefill": "Prefill: quality at equal density", "cache": "The KV cache: quality at equal budget"}[settings["table"]]
    parts = [
        f"# {kind}\n",
        f"Model {model['name']}, {env['dtype']}, {env['device_name']}, torch {env['torch']}, {result['created'][:10]}; "
        f"{settings['samples']} prompts a cell, seed {settings['seed']}. Made by `{result['command']}`.\n",
        "A score is the share of prompts answered exactly (of `text`: bits per byte, lower is better). **Bold**: worse than its random "
        "twin, which reads as much, on a task that dense attention solves. A dash: not measured.\n",
    ]
    for title, grid in grids(result):
        parts += [f"## {title}\n", _markdown(grid)]
    layers = layers_grid(result)
    if layers is not None:
        parts += ["## Errors of the attention output and attention mass covered, by layer\n", _markdown(layers)]
    lists = (
        ("Worse than random", worse_than_random(result["rows"])), ("Failed", failures(result)),
        ("Missing", result.get("table", {}).get("missing", [])), ("Notes", result["notes"]),
    )  # fmt: skip
    for title, lines in lists:
        if title == "Notes" and not lines:
            continue
        parts += [f"## {title}\n", "".join(f"- {line}\n" for line in lines) or "Nothing.\n"]
    return "\n".join(parts)


def _markdown(grid: Grid) -> str:
    header, lines = grid
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---", *["---:"] * (len(header) - 1)], *lines)) + "\n"


def _score(row: dict[str, Any] | None) -> str:
    if row is None or row["score"] is None:
        return "failed" if row is not None and row["status"] == "failed" else "-"
    shown = f"{row['score']:.3f}" if row["unit"] == "bits" else f"{row['score']:.2f}"
    if row.get("turns"):
        shown = " ".join(f"{turn:.2f}" for turn in row["turns"])
    return f"**{shown}**" if row.get("worse") else shown


def _cells(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Task and mode of the columns, in the order of the rows."""
    return list(dict.fromkeys((row["task"], row["mode"]) for row in rows))


def _methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Dense, the methods in their order, then what chooses at random by growing share."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    rank = {row["method"]: (row["slug"] != "dense", row["slug"].startswith("random"), row.get("system") or "") for row in rows}
    return sorted(names, key=lambda name: rank[name])


def _prefill(rows: list[dict[str, Any]]) -> Grid:
    columns = _cells(rows)
    header = ["method", "density", *(task for task, _ in columns), "ms a prompt"]
    lines = []
    for method in _methods(rows):
        own = {(row["task"], row["mode"]): row for row in rows if row["method"] == method}
        known = [row for row in own.values() if row["status"] == "ok"]
        density = "-" if not known or known[0]["prefill_density"] is None else f"{known[0]['prefill_density']:.3f}"
        ms = f"{known[0]['prefill_ms']:.1f}" if known and known[0]["prefill_ms"] is not None else "-"
        lines.append([f"`{method}`", density, *(_score(own.get(column)) for column in columns), ms])
    return header, lines


def _cache(rows: list[dict[str, Any]]) -> Grid:
    columns = _cells(rows)
    header = [
        "method", "KV bytes / dense", "index / dense", "host / dense", "read", *(f"{task}, {mode}" for task, mode in columns), "peak MB",
        "decode ms",
    ]  # fmt: skip
    lines = []
    for method in _methods(rows):
        own = {(row["task"], row["mode"]): row for row in rows if row["method"] == method}
        known = [row for row in own.values() if row["status"] == "ok"]
        lines.append([f"`{method}`", *_bytes(known), *(_score(own.get(column)) for column in columns), *_costs(known)])
    return header, lines


def _bytes(known: list[dict[str, Any]]) -> list[str]:
    if not known or not known[0]["kv_bytes_dense"]:
        return ["-"] * 4
    row, dense = known[0], known[0]["kv_bytes_dense"]
    shares = [f"{row[name] / dense:.3f}" if row.get(name) is not None else "-" for name in ("kv_bytes", "index_bytes", "host_bytes")]
    return [*shares, "-" if row["decode_density"] is None else f"{row['decode_density']:.3f}"]


def _costs(known: list[dict[str, Any]]) -> list[str]:
    row = known[0] if known else {"peak_bytes": None, "decode_ms": None}
    peak, decode = row["peak_bytes"], row["decode_ms"]
    return ["-" if peak is None else f"{peak / 1e6:.1f}", "-" if decode is None else f"{decode:.1f}"]
