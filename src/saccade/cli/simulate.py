"""`saccade simulate gna`: what a choice of window, stride and tiles is worth, without running it."""

from __future__ import annotations

import math
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer


class What(StrEnum):
    gna = "gna"


def command(
    what: Annotated[What, typer.Argument(help="gna: neighbourhood attention on a grid of 1 to 3 axes.")],
    grid: Annotated[str, typer.Option(help="Tokens along each axis, such as 30,48,80.")],
    window: Annotated[str, typer.Option(help="Keys read along each axis, 'full' for the whole axis, such as full,12,24.")],
    stride: Annotated[str, typer.Option(help="Queries that share a window along each axis, such as 1,4,8.")] = "1",
    tile: Annotated[str, typer.Option(help="Coordinates of a query tile along each axis, such as 1,8,8.")] = "64",
    key_tile: Annotated[str | None, typer.Option(help="The same for keys; default: the query tile.")] = None,
    dilation: Annotated[str, typer.Option(help="Distance of neighbours along each axis.")] = "1",
    causal: Annotated[str, typer.Option(help="Along each axis: yes where windows end at their query, else no.")] = "no",
    check: Annotated[
        bool, typer.Option("--check", help="Count the tiles of the real lists too; exit code 1 where they differ by over 10%.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Predict the speed-up of neighbourhood attention: the FLOP bound, and what static and dynamic key tiles make of it.

    One number stands for all axes. Speed-ups are over self attention with the same tiles, time taken to follow visited tiles.
    """
    from saccade.cli.console import console, write, write_json
    from saccade.parts.static.neighborhood import Neighborhood
    from saccade.parts.static.simulate import measure, simulate

    extents = _numbers("--grid", grid)
    windows = [None if part == "full" else _number("--window", part) for part in _parts(window)]
    causals = [_yes(part) for part in _parts(causal)]
    hood = Neighborhood.of(
        extents, windows if len(windows) > 1 else windows[0], _one_or_all(_numbers("--stride", stride)),
        _one_or_all(_numbers("--dilation", dilation)), causals if len(causals) > 1 else causals[0],
    )  # fmt: skip
    tiles = _tile("--tile", tile, hood.grid)
    key_tiles = tiles if key_tile is None else _tile("--key-tile", key_tile, hood.grid)
    found = simulate(hood, tiles, key_tiles)
    measured = measure(hood, tiles, key_tiles) if check else None
    shown = {
        "grid": hood.grid, "window": hood.window, "stride": hood.stride, "dilation": hood.dilation,
        "causal": tuple("yes" if c else "no" for c in hood.causal), "tile": tiles, "key-tile": key_tiles,
    }  # fmt: skip
    result: dict[str, Any] = {
        "grid": hood.grid, "window": hood.window, "stride": hood.stride, "dilation": hood.dilation, "causal": hood.causal,
        "tile": tiles, "key_tile": key_tiles, **asdict(found), "perfect": found.perfect,
        "command": "saccade simulate gna " + " ".join(f"--{name} {_text(values)}" for name, values in shown.items()),
    }  # fmt: skip
    if measured is not None:
        result |= {"measured_static": measured[0], "measured_dynamic": measured[1]}
    if json:
        write_json(result)
    else:
        write(_table(result))
        console().print(result["command"], style="dim", markup=False, soft_wrap=True)
    if measured is not None and not all(
        math.isclose(a, b, rel_tol=0.1) for a, b in zip(measured, (found.static, found.dynamic), strict=True)
    ):
        raise typer.Exit(1)


def _parts(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",")]


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} got {text!r}: expected whole numbers, one or one for each axis, such as 1,4,8")
    return int(text)


def _numbers(name: str, text: str) -> list[int]:
    return [_number(name, part) for part in _parts(text)]


def _one_or_all(values: list[int]) -> int | list[int]:
    return values if len(values) > 1 else values[0]


def _yes(text: str) -> bool:
    if text not in ("yes", "no"):
        raise ValueError(f"--causal got {text!r}: expected yes or no, one or one for each axis")
    return text == "yes"


def _tile(name: str, text: str, grid: tuple[int, ...]) -> tuple[int, ...]:
    sizes = _numbers(name, text)
    sizes = sizes * len(grid) if len(sizes) == 1 else sizes
    if len(sizes) != len(grid) or min(sizes) < 1:
        raise ValueError(f"{name} {text} does not fit a grid of {len(grid)} axes: give one number of at least 1, or one for each axis")
    return tuple(min(t, n) for t, n in zip(sizes, grid, strict=True))


def _text(values: tuple[object, ...]) -> str:
    return ",".join(map(str, values))


def _table(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "speed-up", "of the bound", "key tiles per query tile"):
        table.add_column(title, justify="left" if not title else "right")
    bound = result["flop_bound"]
    rows = [("FLOP bound", bound, None), ("static key tiles", result["static"], result["visited_static"])]
    rows.append(("dynamic key tiles", result["dynamic"], result["visited_dynamic"]))
    if "measured_static" in result:
        rows += [("static, counted", result["measured_static"], None), ("dynamic, counted", result["measured_dynamic"], None)]
    for name, value, visited in rows:
        table.add_row(name, f"{value:.2f}", f"{value / bound:.0%}", "" if visited is None else f"{visited:.2f}")
    verdict = "perfectly block-sparse" if result["perfect"] else "not perfectly block-sparse"
    fill = f"query tiles are {result['fill']:.0%} full, {result['key_tiles']} key tiles in all: {verdict}"
    return Group(table, Text(""), Text(fill))
