"""`saccade train pocket`: the recipe of the model that ships with the package."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Recipe(StrEnum):
    pocket = "pocket"
    chains = "pocket-chains"
    length = "pocket-length"
    finish = "pocket-finish"
    tiny = "tiny"


def command(
    recipe: Annotated[
        Recipe, typer.Argument(help="pocket, then -chains, -length and -finish with --start: minutes on GPUs; tiny: seconds on a CPU.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, metrics and the model; a run in it is resumed.")],
    start: Annotated[
        Path | None, typer.Option("--start", help="pocket-chains, -length, -finish: folder with the weights to go on from.")
    ] = None,
    seconds: Annotated[float | None, typer.Option("--seconds", help="Length of the run; the shipped model's by default.", min=10)] = None,
    steps: Annotated[int, typer.Option("--steps", help="tiny: length of the run.", min=1)] = 16,
    examine: Annotated[bool, typer.Option("--examine/--no-examine", help="Score the model by length at the end (not for tiny).")] = True,
) -> None:
    """Train the pocket model from the Python sources installed beside the interpreter.

    Runs alone or under torchrun (`torchrun --nproc-per-node 2 -m saccade.cli.main train pocket -o runs/pocket`).
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.train.config import chains_config, finish_config, length_config, pocket_config, tiny_config
    from saccade.train.pocket import train
    from saccade.train.report import write_report

    folder = out.parent
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run")
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist: create it, or give another --out")
    given = {} if seconds is None else {"seconds": seconds}
    follow_ups = {Recipe.chains: chains_config, Recipe.length: length_config, Recipe.finish: finish_config}
    if recipe in follow_ups:
        if start is None or not (start / "config.json").is_file():
            raise ValueError(f"{recipe.value} goes on from trained weights: give their folder with --start (given: {start})")
        config = follow_ups[recipe](out, start, **given)
    else:
        config = tiny_config(out, steps) if recipe is Recipe.tiny else pocket_config(out, **given)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing the text", total=config.seconds or steps)

        def show(row: dict[str, Any]) -> None:
            done = row["seconds"] if config.seconds else row["step"]
            bar.update(task, completed=done, description=f"step {row['step']}  loss {row['loss']:.3f}")

        weights = train(config, show)
    write(f"model: {weights}")
    if examine and recipe is not Recipe.tiny and int(os.environ.get("RANK", "0")) == 0:
        import torch

        write(f"scores: {write_report(weights, 'cuda' if torch.cuda.is_available() else 'cpu')}")
