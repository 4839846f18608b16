"""`saccade study`: experiments that train small models alike and compare them, each a command of its own."""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saccade.cli.errors import friendly

group = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


@group.callback()
def about() -> None:
    """Train small models alike and compare them."""


@group.command("recall")
@friendly()
def recall(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for study.json, study.html and the runs; a study in it goes on.")],
    layers: Annotated[
        list[str] | None,
        typer.Option("--layers", "-l", help="A contestant, such as 'deltanet*3,softmax', repeated up to --depth; give it again for more."),
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Layers of every contestant; 4 by default.", min=1)] = None,
    dim: Annotated[int | None, typer.Option("--dim", help="Width of the models; 64 by default.", min=8)] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Heads of a layer; 2 by default.", min=1)] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a sequence; 256 by default.", min=8)] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Pairs to remember; 32 by default.", min=1)] = None,
    fewest: Annotated[int | None, typer.Option("--fewest", help="Pairs of the easiest training batches; 1 by default.", min=1)] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", help="Token ids, half of them keys; 128 by default.", min=8)] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps of each; 600 by default.", min=1)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences a step; 8 by default.", min=1)] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Peak learning rate; 0.01 by default.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides weights and data; 0 by default.")] = None,
    half: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    device: Annotated[Device | None, typer.Option("--device", help="The GPU if there is one, unless told otherwise.")] = None,
) -> None:
    """Which layers can look up many things at once: multi-query associative recall by layers of several kinds.

    Every contestant trains on the same sequences with the same optimizer. The table shows the share of the queries answered.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.evaluate.study_recall import CONTESTANTS, HEADER, RecallSettings, run_study, shrunk, table_rows, write_study_page

    settings = shrunk(
        RecallSettings(), depth=depth, dim=dim, heads=heads, length=length, pairs=pairs, fewest=fewest, vocab=vocab, steps=steps,
        batch=batch, rate=rate, seed=seed, precision="bfloat16" if half else None,
    )  # fmt: skip
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the study")
    names = tuple(layers or CONTESTANTS)
    command = f"saccade {shlex.join(sys.argv[1:])}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        tasks = {name: bar.add_task(name, total=settings.steps, start=False) for name in names}

        def show(name: str, row: dict[str, Any]) -> None:
            bar.start_task(tasks[name])
            bar.update(tasks[name], completed=row["step"], description=f"{name}  loss {row['loss']:.3f}")

        result = run_study(names, settings, out, None if device is None else device.value, command, show)
    page = write_study_page(result, out / "study.html")
    write(_table(HEADER, table_rows(result)))
    write(f"result: {out / 'study.json'}, page: {page}")


def _table(header: tuple[str, ...], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
