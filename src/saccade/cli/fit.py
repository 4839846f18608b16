"""`saccade fit`: the context and the batch that a given memory holds, method by method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

METHODS = "snapkv(budget=0.25);streaming-llm;zipcache;quest"


def command(
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    memory: Annotated[str, typer.Option(help="All the memory there is, such as 24GiB or 80GB.")] = "24GiB",
    methods: Annotated[str, typer.Option(help="Specs separated by ; or , .")] = METHODS,
    lengths: Annotated[str, typer.Option(help="Contexts for which the batch is told, such as 8K,32K.")] = "8K,32K,128K",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    reserve: Annotated[float, typer.Option(help="Share of the memory that is kept for activations.")] = 0.1,
    sizes: Annotated[
        str, typer.Option(help="Three lengths at which bytes are measured, beyond the windows of the methods.")
    ] = "2K,3K,4K",
    plan: Annotated[list[Path] | None, typer.Option(help="A calibration plan; may be given more than once.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Tell how long a context, and how large a batch, each method fits into a given memory.

    Bytes are measured: cache layers of the model's shape are filled, compressed and weighed. No weights are loaded.
    """
    from saccade.cli.compare import parse_lengths
    from saccade.cli.console import console, write
    from saccade.core import Plan
    from saccade.core.files import atomic_write, check_writable
    from saccade.evaluate import fit as fitting
    from saccade.evaluate.contenders import contender, split_methods

    size, wanted, places = fitting.parse_memory(memory), parse_lengths(lengths), parse_lengths(sizes)
    fitting.check_sizes(places)
    if not 0 <= reserve < 1:
        raise ValueError(f"--reserve {reserve} is not a share from 0 to below 1")
    specs = [spec for spec in split_methods(methods) if spec != "dense"]
    for spec in specs:
        contender(spec)
    if json is not None:
        check_writable(json)
    plans = [Plan.load(path) for path in plan or []]
    shape, empty = fitting.shape_of(model, dtype=dtype, offline=offline)
    with console(stderr=True).status("measuring") as status:
        result = fitting.fit(
            shape, empty, specs, memory=size, lengths=wanted, plans=plans, reserve=reserve, sizes=places,
            tell=lambda spec: status.update(f"measuring {spec}"),
        )  # fmt: skip
    write(table(result))
    if json is not None:
        from json import dumps

        with atomic_write(json) as temporary:
            temporary.write_text(dumps(result, indent=1) + "\n")
        console().print(f"Result: {json}", markup=False, soft_wrap=True)


def table(result: dict[str, Any]) -> Group:
    """What the terminal shows of a result."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from saccade.evaluate.fit import size_text

    lengths = result["settings"]["lengths"]
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("method")
    offloaded = any(row.get("host_token_bytes") for row in result["rows"])
    titles = ["a token", *(["host, a token"] if offloaded else []), "fixed", "of dense", "context"]
    for title in (*titles, *(f"batch at {_short(n)}" for n in lengths)):
        shown.add_column(title, justify="right")
    failed: list[Text] = []
    for row in result["rows"]:
        if row["status"] != "ok":
            failed.append(Text.assemble(row["method"], (f" failed: {row['error']}", "red")))
            continue
        mark = " +" if row["idle"] else "" if row["straight"] else " *"
        host = [size_text(row["host_token_bytes"]) if row["host_token_bytes"] else "-"] if offloaded else []
        cells = [size_text(row["token_bytes"]), *host, size_text(max(0, row["fixed_bytes"]))]
        cells += [f"{row['share']:.0%}", f"{row['context']:,}{mark}"]
        shown.add_row(Text(row["method"]), *cells, *(f"{row['batch'][str(n)]:,}" for n in lengths))
    model, settings = result["model"], result["settings"]
    facts = (
        f"{model['name']}: {model['layers']} layers, {model['kv_heads']} key/value heads of {model['head_dim']}, {model['dtype']}, "
        f"weights {size_text(model['weight_bytes'])}; memory {size_text(settings['memory'])}, {settings['reserve']:.0%} of it reserved"
    )
    notes = [f"bytes measured at {', '.join(map(str, settings['measured_at']))} tokens; prompts compressed layer by layer"]
    if model["positions"]:
        notes.append(f"the model was made for {model['positions']:,} positions")
    if any(row["status"] == "ok" and not row["straight"] for row in result["rows"]):
        notes.append("* bytes do not grow along a line there: the numbers beyond it are estimates")
    if any(row["status"] == "ok" and row["idle"] for row in result["rows"]):
        notes.append("+ nothing was dropped at these sizes, so that nothing is known beyond them: give longer --sizes")
    return Group(Text(facts), shown, *failed, *(Text(note, style="dim") for note in notes))


def _short(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else str(n)
