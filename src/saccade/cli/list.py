"""`saccade list`: the catalogue as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from saccade.catalog import FAMILIES, STATUSES, Row, catalog

PHASES = ("prefill", "decode", "cache", "mixer")
NEEDS = ("nothing", "queries", "weights", "hidden", "calibration", "training")


def command(
    family: Annotated[str | None, typer.Option(help="Only this family, such as cache or sparse.")] = None,
    phase: Annotated[str | None, typer.Option(help=f"Only what acts here: {', '.join(PHASES)}.")] = None,
    needs: Annotated[
        str | None, typer.Option(help=f"Only what runs here and needs this: {', '.join(NEEDS)}.")
    ] = None,
    status: Annotated[str | None, typer.Option(help=f"Only this status: {', '.join(STATUSES)}.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List methods and papers, done and planned."""
    from saccade.cli.console import console, write, write_json

    for name, value, allowed in (
        ("family", family, FAMILIES), ("phase", phase, PHASES), ("needs", needs, NEEDS), ("status", status, STATUSES),
    ):
        if value is not None and value not in allowed:
            raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(allowed)}")
    rows = [
        row for row in catalog().values()
        if family in (None, row.family) and status in (None, row.status) and (needs is None or row.done)
    ]
    listed = [(row, facts(row)) for row in rows]
    listed = [
        (row, found) for row, found in listed
        if phase in (None, found["phase"]) and (needs is None or needs in (found["needs"] or ["nothing"]))
    ]
    if json:
        write_json([asdict(row) | found for row, found in listed])
        return
    write(_table(listed, wide=console().width >= 120))


def facts(row: Row) -> dict[str, Any]:
    """What the method itself says: phase, needs (sorted), frees_memory. Of a planned one only the phase, if its kind
    is one; the rest is None."""
    if not row.done:
        return {"phase": row.kind if row.kind in PHASES else None, "needs": None, "frees_memory": None}
    from saccade import methods

    info = methods.load(row.slug).info
    return {"phase": info.phase, "needs": sorted(info.needs), "frees_memory": info.frees_memory}


def _table(listed: list[tuple[Row, dict[str, Any]]], wide: bool) -> Any:
    """One line an entry; a narrow terminal leaves out kind, phase and needs, so that the claim stays readable."""
    from rich.table import Table
    from rich.text import Text

    done = sum(row.done for row, _ in listed)
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    table.caption = f"{len(listed)} entries: {done} done, {len(listed) - done} planned. `saccade show SLUG` tells more."
    for title in ("slug", "family", *(("kind", "phase", "needs") if wide else ()), "status"):
        table.add_column(title, no_wrap=True)
    table.add_column("claim", overflow="fold", min_width=24)
    for row, found in listed:
        needs = "" if found["needs"] is None else ", ".join(found["needs"]) or "nothing"
        more = (row.kind, found["phase"] or "", needs) if wide else ()
        status = Text(row.status, style="green" if row.done else "")
        table.add_row(row.slug, row.family, *more, status, Text(row.claim), style="" if row.done else "dim")
    return table
