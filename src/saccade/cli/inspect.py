"""`saccade inspect`: every head's attention on a prompt, what a prefill method reads of it, and what each head is for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

LENGTH = 4096


def command(
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file; without one, the text that comes with saccade, with a fact to find in it.")
    ] = None,
    prefill: Annotated[str | None, typer.Option(help="A prefill method whose selection is shown, such as minference.")] = None,
    length: Annotated[
        int | None, typer.Option(help=f"Tokens, the first of the file; the whole file, or {LENGTH} of the text that comes with saccade.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page there.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there.")] = None,
    plan: Annotated[list[Path] | None, typer.Option(help="A calibration plan; may be given more than once.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Look a hub name up in the local cache only.")] = False,
) -> None:
    """Look into every head: its attention, what a prefill method reads of it, its sink and retrieval scores."""
    from saccade.cli.console import console, write
    from saccade.core import Plan
    from saccade.core.files import check_writable
    from saccade.evaluate import inspect as inspection

    # everything that can be wrong with the arguments is said before the model is loaded
    plans = [Plan.load(path) for path in plan or []]
    if prefill is not None:
        inspection.check_prefill(prefill, plans)
    if length is not None and length < inspection.SHORTEST:
        raise ValueError(f"--length {length} is too small: give at least {inspection.SHORTEST}")
    for path in (html, json):
        if path is not None:
            check_writable(path)
    if html is not None and json is not None and html.absolute() == json.absolute():
        raise ValueError(f"--html and --json both name {html}: give two files")
    if html is not None:
        _check_report()
    text = None if prompt_file is None else _read(prompt_file)

    from saccade.evaluate.loading import load_model

    loaded, tokenizer = load_model(model, device=device, dtype=dtype, offline=offline)
    ids = _ids(tokenizer, text, prompt_file, length)
    result = _run(
        loaded, tokenizer, ids, prefill=prefill, plans=plans, name=model,
        source="the shipped text with a fact in the middle" if prompt_file is None else prompt_file.name,
        command=_words(model, prompt_file, prefill, length, html, json, plan, device, dtype, offline),
    )  # fmt: skip
    write(table(result))
    if json is not None:
        inspection.save(result, json)
    if html is not None:
        from saccade.report.inspect_page import write_page

        write_page(result, html)
    for what, path in (("Result", json), ("Page", html)):
        if path is not None:
            console().print(f"{what}: {path}", markup=False, soft_wrap=True)


def _read(path: Path) -> str:
    """The prompt. Raises ValueError when there is none."""
    if not path.is_file():
        raise ValueError(f"there is no prompt file {path}: give a UTF-8 text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    if not text.strip():
        raise ValueError(f"{path} is empty: write a prompt into it")
    return text


def _check_report() -> None:
    """Raise ImportError now rather than after the run."""
    from importlib.util import find_spec

    if find_spec("jinja2") is None:
        raise ImportError("the page needs jinja2: pip install 'saccade[report]', or leave --html out")


def _ids(tokenizer: Any, text: str | None, path: Path | None, length: int | None) -> list[int]:
    from saccade.evaluate.inspect import needle_prompt
    from saccade.evaluate.prompts import Codec

    if text is None:
        return needle_prompt(tokenizer, LENGTH if length is None else length)
    codec = Codec(tokenizer)
    ids = [*codec.prefix, *codec.encode(text.encode("utf-8"))]
    if length is not None and len(ids) < length:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than --length {length}: give a longer file or a smaller --length")
    return ids[:length]


def _words(
    model: str, prompt_file: Path | None, prefill: str | None, length: int | None, html: Path | None, json: Path | None,
    plan: list[Path] | None, device: str | None, dtype: str | None, offline: bool,
) -> str:  # fmt: skip
    """The command line that makes the result again."""
    import shlex

    words = ["saccade", "inspect", "--model", model]
    given = [
        ("prompt-file", prompt_file), ("prefill", prefill), ("length", length), *(("plan", path) for path in plan or []),
        ("device", device), ("dtype", dtype), ("html", html), ("json", json),
    ]  # fmt: skip
    for name, value in given:
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join([*words, *(["--offline"] if offline else [])])


def _run(model: Any, tokenizer: Any, ids: list[int], **settings: Any) -> dict[str, Any]:
    """The inspection with a progress bar on stderr."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from saccade.cli.console import console
    from saccade.evaluate.inspect import inspect

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    err = console(stderr=True)
    # in a file or a pipe a bar would only leave an empty line
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        task = bars.add_task(f"reading {len(ids):,} tokens", total=1.0)

        def show(share: float, doing: str) -> None:
            bars.update(task, completed=share, description=doing)

        return inspect(model, tokenizer, ids, progress=show, **settings)


def table(result: dict[str, Any]) -> Group:
    """A line for each layer: what is read and covered, and its strongest sink and retrieval heads."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    settings, attention, env = result["settings"], result["attention"], result["environment"]
    spec = settings["prefill"]
    heading = f"{result['model']['name']} on {env['device_name']}, {env['dtype']}: {attention['length']:,} tokens, {settings['prompt']}"
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    names = ["layer", *(["computed", "read", "mass", "least mass"] if spec else []), "sink", "retrieval"]
    for name in names:
        grid.add_column(name, justify="right", no_wrap=True)
    for layer in attention["layers"]:
        heads = layer["heads"]
        cells = [str(layer["layer"])]
        if spec:
            known = [head for head in heads if spec in head["mass"]]
            least = min(known, key=lambda head: head["mass"][spec])
            density, mass = (sum(head[key][spec] for head in known) / len(known) for key in ("density", "mass"))
            computed = "-" if layer["density"] is None else f"{layer['density']:.1%}"
            cells += [computed, f"{density:.1%}", f"{mass:.1%}", f"{least['mass'][spec]:.1%} head {least['head']}"]
        for score in ("sink", "retrieval"):
            best = max((head for head in heads if head[score] is not None), key=lambda head, score=score: head[score], default=None)
            cells.append("-" if best is None else f"{best[score]:.2f} head {best['head']}")
        grid.add_row(*cells)
    told = "sink: mean mass on the first tokens; retrieval: mean mass from a repeated n-gram to what followed it before. The highest head."
    if spec:
        told = f"computed: pairs computed of pairs visible; read: pairs that {spec} lists; mass: attention mass on those. " + told
    return Group(Text(heading, style="dim"), grid, Text(told, style="dim"))
