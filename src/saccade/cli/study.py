"""`saccade study`: experiments that train small models alike and compare them, each a command of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from saccade.cli.errors import friendly

group = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


Workers = Annotated[int, typer.Option("--workers", help="Trainings side by side, each a process on the same device.", min=1)]
Seconds = Annotated[float | None, typer.Option("--seconds", help="Start no further training after that; what is missing is said.")]


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
    workers: Workers = 1,
    seconds: Seconds = None,
    device: Annotated[Device | None, typer.Option("--device", help="The GPU if there is one, unless told otherwise.")] = None,
) -> None:
    """Which layers can look up many things at once: multi-query associative recall by layers of several kinds.

    Every contestant trains on the same sequences with the same optimizer. The table shows the share of the queries answered.
    """
    from saccade.cli.console import write
    from saccade.evaluate.study import shrunk
    from saccade.evaluate.study_recall import CONTESTANTS, HEADER, RecallSettings, run_study, table_rows, write_study_page

    settings = shrunk(
        RecallSettings(), depth=depth, dim=dim, heads=heads, length=length, pairs=pairs, fewest=fewest, vocab=vocab, steps=steps,
        batch=batch, rate=rate, seed=seed, precision="bfloat16" if half else None,
    )  # fmt: skip
    names = tuple(layers or CONTESTANTS)
    with _watching(len(names), lambda found: f"accuracy {found['scores']['accuracy']:.3f}") as (show, ended):
        result = run_study(
            names, settings, out, None if device is None else device.value, _command(), show,
            workers=workers, seconds=seconds, finished=ended,
        )  # fmt: skip
    page = write_study_page(result, out / "study.html")
    write(_table(HEADER, table_rows(result)))
    _close(result, out, page)


@group.command("hybrid")
@friendly()
def hybrid(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for study.json, study.html and the runs; a study in it goes on.")],
    mixers: Annotated[
        str | None, typer.Option("--mixers", help="Of hgrn, retnet, gla, hgrn-2, deltanet and gated-deltanet; all by default.")
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", help="Linear layers to one of softmax; pure,24:1,12:1,6:1,3:1,1:1 by default.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="Layers of every contestant; 12 by default.", min=2)] = None,
    dim: Annotated[int | None, typer.Option("--dim", help="Width of the models; 128 by default.", min=8)] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Heads of a layer; 4 by default.", min=1)] = None,
    length: Annotated[int | None, typer.Option("--length", help="Tokens of a sequence; 256 by default.", min=8)] = None,
    pairs: Annotated[int | None, typer.Option("--pairs", help="Pairs to remember; 32 by default.", min=1)] = None,
    fewest: Annotated[int | None, typer.Option("--fewest", help="Pairs of the easiest training batches; 1 by default.", min=1)] = None,
    vocab: Annotated[int | None, typer.Option("--vocab", help="Token ids of recall, half of them keys; 128 by default.", min=8)] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps on recall; 1500 by default.", min=1)] = None,
    text_steps: Annotated[int | None, typer.Option("--text-steps", help="Training steps on text; 500 by default.", min=1)] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences a step; 64 by default.", min=1)] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="Peak learning rate; 0.01 by default.")] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Folder whose files are the text; the sources that ship with saccade by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Decides weights and data; 0 by default.")] = None,
    half: Annotated[bool, typer.Option("--bf16", help="Train under bfloat16 autocast.")] = False,
    workers: Workers = 1,
    seconds: Seconds = None,
    device: Annotated[Device | None, typer.Option("--device", help="The GPU if there is one, unless told otherwise.")] = None,
) -> None:
    """How many softmax layers a model of linear attention needs: six mixers, each pure and at several ratios, and softmax alone.

    Every contestant trains twice, on associative recall and on text, the same data in the same order for all. The tables show the share of
    the queries answered, and bits per byte of the text held out.
    """
    from saccade.cli.console import write
    from saccade.evaluate.study import shrunk
    from saccade.evaluate.study_hybrid import KINDS, RATIOS, HybridSettings, contestants, run_hybrid_study, tables, write_hybrid_page

    settings = shrunk(
        HybridSettings(), depth=depth, dim=dim, heads=heads, length=length, pairs=pairs, fewest=fewest, vocab=vocab, steps=steps,
        text_steps=text_steps, batch=batch, rate=rate, seed=seed, precision="bfloat16" if half else None,
        folder=None if text is None else str(text), endings=None if text is None else (),
    )  # fmt: skip
    chosen = contestants(_listed(mixers, KINDS), _listed(ratios, RATIOS), settings.depth)

    def told(found: dict[str, Any]) -> str:
        return ", ".join(f"{name} {score:.3f}" for name, score in found["scores"].items() if name in ("accuracy", "bits"))

    with _watching(2 * len(chosen), told) as (show, ended):
        result = run_hybrid_study(
            chosen, settings, out, None if device is None else device.value, _command(), show,
            workers=workers, seconds=seconds, finished=ended,
        )  # fmt: skip
    page = write_hybrid_page(result, out / "study.html")
    for table in tables(result) if result["rows"] else []:
        write(table.title)
        write(_table(tuple(table.header), [list(row) for row in table.rows]))
    _close(result, out, page)


@contextmanager
def _watching(jobs: int, told: Callable[[dict[str, Any]], str]) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
    """A bar for all jobs and one for each that runs, on a terminal; elsewhere a line a job at its end. Gives what `run_jobs` calls."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    screen = console(stderr=True)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        whole = bar.add_task("runs", total=jobs)
        running: dict[str, TaskID] = {}

        def show(name: str, row: dict[str, Any]) -> None:
            if name not in running:
                running[name] = bar.add_task(name, total=None)
            bar.update(running[name], completed=row["step"], description=f"{name}  loss {row['loss']:.3f}")

        def ended(name: str, outcome: Any) -> None:
            if name in running:
                bar.remove_task(running.pop(name))
            bar.update(whole, completed=len(outcome.finished) + len(outcome.failed))
            found = outcome.finished.get(name)
            line = f"failed: {outcome.failed[name]}" if found is None else f"{told(found)}, {found['seconds']:,} s"
            screen.print(f"{name}: {line}", markup=False)

        yield show, ended


def _close(result: dict[str, Any], out: Path, page: Path) -> None:
    """Say where the result is, and what is not in it; exit code 1 where a contestant failed."""
    from saccade.cli.console import write

    write(f"result: {out / 'study.json'}, page: {page}")
    if result["missing"]:
        write(f"missing, for the time was up: {', '.join(result['missing'])}; the same command goes on")
    for name, said in result["failed"].items():
        write(f"failed: {name}: {said}")
    if result["failed"]:
        raise typer.Exit(1)


def _listed(text: str | None, default: tuple[str, ...]) -> list[str]:
    return list(default) if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _command() -> str:
    return f"saccade {shlex.join(sys.argv[1:])}"


def _table(header: tuple[str, ...], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    return table
