"""A result, its growth and its comparison as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from saccade.bench.compare import Comparison



def length_text(n: float) -> str:
    return f"{n / 1024:g}K" if n >= 1024 and n % 1024 == 0 else f"{n:,g}"


def case_text(case: dict[str, Any], *, without: str = "") -> str:
    """ "N 32K, batch 1, 32/8 heads, D 128, density 0.1"."""
    rest = {key: value for key, value in case.items() if key != without and value is not None}
    parts = [f"N {length_text(rest.pop('n'))}"] if "n" in rest else []
    if "batch" in rest:
        parts.append(f"batch {rest.pop('batch')}")
    if "heads" in rest:
        shared = f"/{rest.pop('kv_heads')}" if "kv_heads" in rest else ""
        parts.append(f"{rest.pop('heads')}{shared} heads")
    if "dim" in rest:
        parts.append(f"D {rest.pop('dim')}")
    return ", ".join([*parts, *(f"{key.replace('_', ' ')} {value}" for key, value in rest.items())])


def ms_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.4f}"


def rate_text(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if value >= 0.1:
        return f"{value:.3g} {unit}"
    return f"{1000 * value:.3g} {unit.replace('TFLOP', 'GFLOP').replace('TB', 'GB')}"


def result_table(result: dict[str, Any]) -> Group:
    """A table for each case; then the growth."""
    env, top = result["environment"], result["ceilings"]
    ceilings = ", ".join(
        text for text in (
            f"copy {rate_text(top.get('copy'), 'TB/s')}" if top.get("copy") else "",
            f"matmul {rate_text(top.get('matmul'), 'TFLOP/s')}" if top.get("matmul") else "",
        ) if text
    )  # fmt: skip
    parts: list[Any] = [
        Text(
            f"{env.get('device_name')}, {result['settings'].get('dtype')}, torch {env.get('torch')}, triton {env.get('triton') or 'absent'}"
            + (f"; measured ceilings: {ceilings}" if ceilings else ""), style="dim",
        )
    ]  # fmt: skip
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(f"{row['family']}\0{case_text(row['case'])}", []).append(row)
    names = max((len(row["contestant"]) for row in result["rows"]), default=10)
    for title, rows in groups.items():
        family, _, case = title.partition("\0")
        head = Text.assemble("\n", (family, "bold cyan"), f"  {case}")
        density = rows[0]["density"]
        if density is not None and density < 1:
            head.append(f"  {density:.1%} of pairs", "dim")
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for column, width in (("", names), ("ms", 8), ("20-80%", 15), ("rate", 13), ("dense", 7), ("peer", 6), ("error", 8), ("ran", 9)):
            grid.add_column(column, justify="left" if column in ("", "ran") else "right", no_wrap=True, width=width)
        grid.add_column("", overflow="fold")
        for row in rows:
            grid.add_row(*_cells(row))
        parts += [head, grid]
    if result["growth"]:
        parts += [Text("\ngrowth: time ~ N ^ exponent", style="bold"), _growth(result["growth"])]
    absent = [why for why in result["libraries"].values() if "not" in why]
    parts.append(Text(
        "\nms: median. dense, peer: time of the best dense contestant, and of the best peer, over ms and selection: above 1 is faster. "
        "error: relative L2 on a slice." + "".join(f"\n{why}" for why in absent), style="dim",
    ))  # fmt: skip
    return Group(*parts)


def _cells(row: dict[str, Any]) -> list[Any]:
    name = Text(row["contestant"], style="bold" if row["role"] == "ours" else "")
    if row["status"] != "ok":
        style = "red" if row["status"] == "failed" else "yellow"
        return [name, Text(row["status"], style=style), "", "", "", "", "", row["impl"], Text(row["note"], style=style)]
    ratio = ["-" if row[key] is None else f"{row[key]:.2f}x" for key in ("ratio", "ratio_peer")]
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    choosing = "" if row["selection_ms"] is None else f"choosing {ms_text(row['selection_ms'])} ms"
    note = "; ".join(filter(None, (choosing, row["note"], f"error above {row['allowed']:.1e}" if row["ok"] is False else "")))
    return [
        name, ms_text(row["ms"]), f"{ms_text(row['ms_low'])}-{ms_text(row['ms_high'])}", rate_text(row["rate"], row["rate_unit"]), *ratio,
        Text(error, style="red" if row["ok"] is False else ""), row["impl"], Text(note, style="dim"),
    ]  # fmt: skip


def _growth(found: list[dict[str, Any]]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("family", "case", "contestant", "N", "exponent"):
        grid.add_column(column, justify="right" if column == "exponent" else "left", no_wrap=True)
    for line in found:
        lengths = f"{length_text(line['lengths'][0])} to {length_text(line['lengths'][-1])}"
        grid.add_row(line["family"], case_text(line["case"]), line["contestant"], lengths, f"{line['exponent']:.2f}")
    return grid


def comparison_table(found: Comparison, name: str) -> Group:
    """What got slower and faster, the worst first."""
    parts: list[Any] = [Text(f"\nagainst {name}", style="bold"), *(Text(f"  {warning}", style="yellow") for warning in found.warnings)]
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("", "family", "case", "contestant", "old ms", "new ms", ""):
        grid.add_column(column, justify="right" if "ms" in column else "left", no_wrap=column != "")
    for c in found.changes:
        slower = c.percent is None or c.percent > 0
        told = "no longer runs" if c.percent is None else f"{abs(c.percent):.1f} % {'slower' if slower else 'faster'}"
        style = "red" if slower else "green"
        grid.add_row(
            Text(told, style=style), c.family, case_text(c.case), c.contestant, ms_text(c.old_ms), ms_text(c.new_ms), c.note
        )
    if found.changes:
        parts.append(grid)
    rest = f"{found.same} rows within their spread" + (f", {found.unmatched} in one of the two only" if found.unmatched else "")
    parts.append(Text(rest, style="dim"))
    return Group(*parts)
