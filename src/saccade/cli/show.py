"""`saccade show SLUG`: everything known about one method or paper, on one page."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from saccade.catalog import Row, find


def command(
    slug: Annotated[str, typer.Argument(help="A name from `saccade list`, such as snapkv.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """Show one method: what it does, its fields, its use."""
    from saccade.cli.console import write, write_json

    row = find(slug)
    page = describe(row)
    if json:
        write_json(page)
        return
    write(_render(row, page))


def describe(row: Row) -> dict[str, Any]:
    """The page as data: the row, its link, and for what runs here its docstring, fields, facts and usage lines."""
    from saccade.cli.list import facts

    page = dataclasses.asdict(row) | {"url": row.url} | facts(row)
    if not row.done:
        return page | {"about": "", "fields": [], "usage": []}
    from saccade import methods

    cls = methods.load(row.slug)
    return page | {"about": _about(cls), "fields": _fields(cls), "usage": _usage(page)}


def _about(cls: type) -> str:
    """What the method's file and class say of themselves."""
    own = inspect.cleandoc(cls.__doc__ or "")
    if own.startswith(f"{cls.__name__}("):  # what dataclass writes where the class has no docstring
        own = ""
    file = inspect.getdoc(inspect.getmodule(cls)) or ""
    return "\n\n".join(part for part in (file, own) if part)


def _fields(cls: type) -> list[dict[str, str]]:
    described = []
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            default = repr(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        else:
            default = "required"
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        described.append({"name": field.name, "type": kind, "default": default})
    return described


def _usage(page: dict[str, Any]) -> list[str]:
    slug, phase = page["slug"], page["phase"]
    if phase == "mixer":
        return [f'layer = saccade.mixer("{slug}", dim=512, heads=8); y, state = layer(x)']
    attached = f'with saccade.attach(model, {phase}="{slug}"): model.generate(**inputs)'
    if "calibration" in page["needs"]:
        attached = attached.replace('")', '", plan=plan)')
        return [f'plan = saccade.calibrate(model, "{slug}", token_batches)', attached]
    return [attached, f"saccade compare --methods {','.join(dict.fromkeys(('dense', slug)))}"]


def _render(row: Row, page: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")

    lines = {
        "paper": f"arXiv {row.arxiv}  {row.url}" if row.url else "",
        "family": row.family,
        "kind": row.kind,
        "status": "done" if row.done else "planned: not in the library yet",
        "claim": row.claim,
    }
    if row.done:
        lines |= {
            "phase": page["phase"],
            "needs": ", ".join(page["needs"]) or "nothing",
            "frees memory": "yes" if page["frees_memory"] else "no",
            "module": row.module,
            "evidence": f"pytest {row.evidence}",
        }
    for name, value in lines.items():
        if value:
            facts.add_row(name, Text(value))
    parts: list[Any] = [Text.assemble((row.slug, "bold"), "  ", row.title), Text(""), Padding(facts, (0, 0, 0, 2))]
    if page["about"]:
        parts += [_heading("what it does"), Padding(Text(page["about"]), (0, 0, 0, 2))]
    if page["fields"]:
        table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
        for title in ("field", "type", "default"):
            table.add_column(title, overflow="fold")
        for field in page["fields"]:
            table.add_row(Text(field["name"]), Text(field["type"]), Text(field["default"]))
        parts += [_heading("fields"), Padding(table, (0, 0, 0, 2))]
    if page["usage"]:
        parts += [_heading("use it"), Padding(Text("\n".join(page["usage"])), (0, 0, 0, 2))]
    return Group(*parts)


def _heading(text: str) -> Any:
    from rich.text import Text

    return Text(f"\n{text}", style="bold")
