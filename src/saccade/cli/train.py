"""`saccade train`: a recipe from a YAML file, those of the model that ships with the package, and one that extends any model's context."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saccade.train.extend import ExtendConfig


class Recipe(StrEnum):
    pocket = "pocket"
    chains = "pocket-chains"
    length = "pocket-length"
    finish = "pocket-finish"
    tiny = "tiny"
    extend = "extend"


class Positions(StrEnum):
    interpolate = "interpolate"
    base = "base"
    keep = "keep"


class Adapt(StrEnum):
    lora_plus = "lora+"
    lora = "lora"
    full = "full"


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


# the options that a recipe file has no use for: giving one is a mistake, not a wish to be passed over
_BUILT_IN_ONLY = ("start", "examine", "context", "original", "method", "positions", "adapt", "rank", "batch", "rate", "data", "seed")


def command(
    ctx: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            help="A YAML file (docs/training.md), or pocket, then pocket-chains, -length and -finish with --start: minutes on GPUs; "
            "tiny: seconds on a CPU; extend: a longer context for the model in --start."
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for checkpoints, metrics and the model; a run in it is resumed (not by extend).")
    ],
    start: Annotated[
        Path | None, typer.Option("--start", help="pocket-chains, -length, -finish, extend: folder with the weights to go on from.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Length of the run; the shipped model's, or the file's, by default.", min=10)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Length of the run; tiny: 16, extend: 1000, or the file's, by default.", min=1)
    ] = None,
    device: Annotated[Device | None, typer.Option("--device", help="A recipe file's device; what it says by default.")] = None,
    examine: Annotated[bool, typer.Option("--examine/--no-examine", help="Score the model by length at the end (pocket).")] = True,
    context: Annotated[int | None, typer.Option("--context", help="extend: tokens the model should serve.", min=2)] = None,
    original: Annotated[
        int | None, typer.Option("--original", help="extend: tokens it was trained for; what its configuration says.", min=2)
    ] = None,
    method: Annotated[str, typer.Option("--method", help="extend: the prefill method that runs in training; dense for none.")] = "longlora",
    positions: Annotated[Positions, typer.Option("--positions", help="extend: how positions are stretched.")] = Positions.interpolate,
    adapt: Annotated[
        Adapt, typer.Option("--adapt", help="extend: train adapters with embeddings and norms, adapters alone, or everything.")
    ] = Adapt.lora_plus,
    rank: Annotated[int, typer.Option("--rank", help="extend: rank of the adapters.", min=1)] = 8,
    batch: Annotated[int, typer.Option("--batch", help="extend: sequences a step, run one at a time.", min=1)] = 64,
    rate: Annotated[float, typer.Option("--rate", help="extend: learning rate after 20 steps.")] = 2e-5,
    data: Annotated[Path | None, typer.Option("--data", help="extend: a UTF-8 text file; Python sources by default.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="extend: decides what is drawn.")] = 0,
) -> None:
    """Train a model by a recipe: one in a YAML file, or one of those that are built in.

    A run that was cut off goes on, by the same command, to the same numbers. Runs alone or under torchrun
    (`torchrun --nproc-per-node 2 -m saccade.cli.main train RECIPE -o runs/one`; extend: alone).
    """
    names = [known.value for known in Recipe]
    if recipe not in names:
        if seconds is not None and steps is not None:
            raise ValueError("--steps and --seconds both say how long the run is: give one of them")
        sources = {name: ctx.get_parameter_source(name) for name in _BUILT_IN_ONLY}
        given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
        return _from_file(Path(recipe), names, given, out, steps, seconds, None if device is None else device.value)
    if device is not None:
        raise ValueError(f"--device is for recipe files: {recipe} takes the GPU if there is one")
    chosen = Recipe(recipe)
    if chosen is Recipe.extend:
        if start is None or context is None:
            raise ValueError("extend needs the model and the tokens it should serve: give --start FOLDER and --context N")
        from saccade.train.extend import ExtendConfig

        settings = ExtendConfig(
            start=start, out=out, context=context, original=original, positions=positions.value, adapt=adapt.value,
            rank=rank, alpha=2 * rank, method=None if method == "dense" else method, batch=batch, rate=rate, seed=seed,
            steps=1000 if steps is None else steps,
        )  # fmt: skip
        return _extend(settings, data)
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.train.config import chains_config, finish_config, length_config, pocket_config, tiny_config
    from saccade.train.pocket import train
    from saccade.train.report import write_report

    _check_folder(out)
    length = {} if seconds is None else {"seconds": seconds}
    follow_ups = {Recipe.chains: chains_config, Recipe.length: length_config, Recipe.finish: finish_config}
    if chosen in follow_ups:
        if start is None or not (start / "config.json").is_file():
            raise ValueError(f"{recipe} goes on from trained weights: give their folder with --start (given: {start})")
        config = follow_ups[chosen](out, start, **length)
    else:
        config = tiny_config(out, steps or 16) if chosen is Recipe.tiny else pocket_config(out, **length)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("preparing the text", total=config.seconds or config.steps)

        def show(row: dict[str, Any]) -> None:
            done = row["seconds"] if config.seconds else row["step"]
            bar.update(task, completed=done, description=f"step {row['step']}  loss {row['loss']:.3f}")

        weights = train(config, show)
    write(f"model: {weights}")
    if examine and chosen is not Recipe.tiny and int(os.environ.get("RANK", "0")) == 0:
        import torch

        write(f"scores: {write_report(weights, 'cuda' if torch.cuda.is_available() else 'cpu')}")


def _from_file(
    path: Path, names: list[str], given: list[str], out: Path, steps: int | None, seconds: float | None, device: str | None
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from saccade.cli.console import console, write
    from saccade.train.fields import nearest

    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise ValueError(f"there is no recipe {str(path)!r}: {nearest(str(path), names)} Or give the path of a YAML file")
    if not path.is_file():
        raise ValueError(f"the recipe {path} does not exist: give the path of a YAML file, or one of {', '.join(names)}")
    if given:
        raise ValueError(f"--{' and --'.join(given)} can't be given with a recipe file: write it into {path}")
    from saccade.train.loop import CURVE, train
    from saccade.train.recipe import read_recipe

    recipe = read_recipe(path).lasting(steps, seconds)
    if device is not None:
        recipe = replace(recipe, device=device)  # type: ignore[arg-type]
    _check_folder(out)
    first = int(os.environ.get("RANK", "0")) == 0
    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not (first and screen.is_terminal)) as bar:
        task = bar.add_task("preparing", total=recipe.steps or math.ceil(recipe.seconds or 1))

        def show(row: dict[str, Any]) -> None:
            done = row["step"] if recipe.steps else int(row["seconds"])
            bar.update(task, completed=done, description=f"step {row['step']}  loss {row['loss']:.3f}")

        result = train(recipe, out, show)
    if first:
        write(f"model: {result.weights}")
        write(f"curve: {out / CURVE}")
        write("evaluation: " + ", ".join(f"{name} {value:.4f}" for name, value in result.scores.items()))


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder for the run")
    if not out.parent.is_dir():
        raise ValueError(f"the folder {out.parent} does not exist: create it, or give another --out")


def _extend(config: ExtendConfig, data: Path | None) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.cli.console import console, write
    from saccade.train.corpus import load_corpus
    from saccade.train.extend import extend

    _check_folder(config.out)
    if data is not None and not data.is_file():
        raise ValueError(f"the text file {data} does not exist: give the path of a UTF-8 text file")
    text = load_corpus(16.0)[0].decode() if data is None else data.read_text(encoding="utf-8")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the text", total=config.steps)
        weights = extend(
            config, text, lambda row: bar.update(task, completed=row["step"], description=f"step {row['step']}  loss {row['loss']:.3f}")
        )
    report = json.loads((config.out / "report.json").read_text(encoding="utf-8"))
    write(f"model: {weights}")
    for n, before, after in zip(report["lengths"], report["nats_before"], report["nats_after"], strict=True):
        write(f"nats a token at {n}: {before:.3f} before, {after:.3f} after")
