"""`saccade train pocket`: the recipe of the model that ships with the package."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Recipe(StrEnum):
    pocket = "pocket"
    tiny = "tiny"


def command(
    recipe: Annotated[Recipe, typer.Argument(help="pocket: minutes on one or two GPUs; tiny: seconds on a CPU, to try the recipe.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for checkpoints, metrics and the model; a run in it is resumed.")],
    seconds: Annotated[float, typer.Option("--seconds", help="pocket: length of the run.", min=10)] = 282.0,
    steps: Annotated[int, typer.Option("--steps", help="tiny: length of the run.", min=1)] = 16,
    examine: Annotated[bool, typer.Option("--examine/--no-examine", help="pocket: score the model by length at the end.")] = True,
) -> None:
    """Train the pocket model from the Python sources installed beside the interpreter.

    Runs alone or under torchrun (`torchrun --nproc-per-node 2 -m saccade.cli.main train pocket -o runs/pocket`).
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.train.config import pocket_config, tiny_config
    from saccade.train.pocket import train
    from saccade.train.report import write_report

    folder = out.parent
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run")
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist: create it, or give another --out")
    config = pocket_config(out, seconds) if recipe is Recipe.pocket else tiny_config(out, steps)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing the text", total=seconds if recipe is Recipe.pocket else steps)

        def show(row: dict[str, Any]) -> None:
            done = row["seconds"] if recipe is Recipe.pocket else row["step"]
            bar.update(task, completed=done, description=f"step {row['step']}  loss {row['loss']:.3f}")

        weights = train(config, show)
    write(f"model: {weights}")
    if examine and recipe is Recipe.pocket and int(os.environ.get("RANK", "0")) == 0:
        import torch

        write(f"scores: {write_report(weights, 'cuda' if torch.cuda.is_available() else 'cpu')}")
