"""`saccade table prefill|cache`: the quality tables over every method, made unattended, resumed, written as JSON and Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group


def command(
    kind: Annotated[str, typer.Argument(help="prefill: sparse prefill and static patterns; cache: retrieval, eviction, quantisation.")],
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 4K,8K.")] = "4K,8K,16K",
    samples: Annotated[int, typer.Option(help="Prompts of each cell; they run as one batch.")] = 8,
    budgets: Annotated[str, typer.Option(help="Aimed densities or budgets, such as 0.4,0.1; all.")] = "",
    methods: Annotated[str, typer.Option(help="Methods by name, separated by commas; all.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks separated by commas; those of the table.")] = "",
    modes: Annotated[str, typer.Option(help="aware, agnostic or both; those of the table.")] = "",
    seconds: Annotated[float | None, typer.Option(help="Stop before the next line once so many seconds have gone by.")] = None,
    patience: Annotated[float | None, typer.Option(help="Give a line up after so many seconds.", min=1)] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, every few seconds.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables there as Markdown.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file given to --json.")] = False,
    no_layers: Annotated[bool, typer.Option("--no-layers", help="Leave errors and masses by layer out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Measure the quality of every method at a few densities or budgets, next to dense attention and to random choice.

    The most telling cells come first. A line that fails is recorded, and the rest goes on.
    """
    from saccade.cli.compare import parse_lengths
    from saccade.cli.console import console, write
    from saccade.core.files import atomic_write, check_writable
    from saccade.evaluate import markdown as pages
    from saccade.evaluate.tables import check_arguments, run_table
    from saccade.evaluate.tasks import split

    chosen: dict[str, Any] = {
        "lengths": parse_lengths(lengths), "samples": samples, "aims": _words(budgets), "systems": _words(methods), "tasks": split(tasks),
        "modes": _words(modes), "seconds": seconds,
    }  # fmt: skip
    # everything that can be wrong with the arguments is said before the model is loaded
    check_arguments(kind, **chosen)
    for path in (json, markdown):
        if path is not None:
            check_writable(path)
    if resume and json is None:
        raise ValueError("--resume needs the file to go on with: give it as --json FILE")
    from saccade.evaluate.loading import load_model

    loaded, tokenizer = load_model(model, device=device, dtype=dtype, offline=offline)
    options = [word for name, value in (("device", device), ("dtype", dtype)) if value is not None for word in (f"--{name}", value)]
    err = console(stderr=True)
    with err.status("starting") as status:

        def tell(text: str) -> None:
            status.update(text)

        result = run_table(
            kind, loaded, tokenizer, seed=seed, json_path=json, resume=resume, layers=not no_layers, name=model, options=options,
            patience=patience, tell=tell, **chosen,
        )  # fmt: skip
    write(table(result))
    if markdown is not None:
        with atomic_write(markdown) as temporary:
            temporary.write_text(pages.text(result), encoding="utf-8")
    for what, path in (("Result", json), ("Tables", markdown)):
        if path is not None:
            console().print(f"{what}: {path}", markup=False, soft_wrap=True)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def table(result: dict[str, Any]) -> Group:
    """What the terminal shows of a result."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from saccade.evaluate.markdown import failures, grids
    from saccade.evaluate.twins import worse_than_random

    parts: list[Any] = []
    for title, (header, lines) in grids(result):
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for place, column in enumerate(header):
            shown.add_column(column, justify="right" if place else "left", overflow="fold")
        for line in lines:
            shown.add_row(*(Text(cell.strip("*`"), style="red" if cell.startswith("**") else "") for cell in line))
        parts += [Text(f"\n{title}", style="bold cyan"), shown]
    lists = (
        ("worse than random where dense succeeds", worse_than_random(result["rows"])), ("failed", failures(result)),
        ("missing", result["table"]["missing"]),
    )  # fmt: skip
    for title, lines in lists:
        parts += [Text(f"\n{title}: {len(lines) or 'nothing'}", style="bold"), *(Text(f"  {line}") for line in lines)]
    parts.append(Text(f"\n{result['table']['seconds']} s; red: worse than the random twin", style="dim"))
    return Group(*parts)
