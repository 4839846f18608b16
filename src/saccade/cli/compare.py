"""`saccade compare`: methods next to dense attention and random eviction, as a table, a file and a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

TASKS = "needle,needle-multikey,dictionary,copy"
LENGTHS = "1024,4096"


def command(
    methods: Annotated[str, typer.Option(help="Specs separated by ; or , such as 'snapkv(budget=0.25);quest'.")],
    model: Annotated[str, typer.Option(help="pocket, a folder with a saved model, or a name on the Hugging Face hub.")] = "pocket",
    tasks: Annotated[
        str | None, typer.Option(help=f"Tasks separated by commas, or all; {TASKS}, and none with --batches.", show_default=False)
    ] = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, such as 1024,4K.")] = LENGTHS,
    samples: Annotated[int, typer.Option(help="Prompts for each task and length.")] = 8,
    batches: Annotated[str, typer.Option(help="Batch sizes whose decoding speed is measured, such as 1,4,16.")] = "",
    steps: Annotated[int, typer.Option(help="Decoding steps that are timed for each batch.")] = 32,
    mode: Annotated[
        str, typer.Option(help="aware: the question is part of the prompt; agnostic: it comes after the compression.")
    ] = "aware",
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there, after every cell.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the page there.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the file given to --json.")] = False,
    plan: Annotated[list[Path] | None, typer.Option(help="A calibration plan; may be given more than once.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file to make the prompts of.")] = None,
    no_floor: Annotated[bool, typer.Option("--no-floor", help="Leave the random-eviction floor out.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Look hub names up in the local cache only.")] = False,
) -> None:
    """Compare methods with dense attention: quality, memory and speed, on the same prompts.

    Tasks: needle, needle-multikey, needle-multivalue, needle-multiquery, dictionary, variables, common-words,
    frequent-words, copy, two-facts, text. Nothing touches the network unless the model is named by its hub name.
    """
    from saccade.cli.console import console, write
    from saccade.core import Plan
    from saccade.core.files import check_writable
    from saccade.evaluate import tasks as known
    from saccade.evaluate.contenders import line_up, split_methods
    from saccade.evaluate.runner import check_settings
    from saccade.evaluate.text import grammar

    # everything that can be wrong with the arguments is said before the model is loaded
    sizes = parse_batches(batches)
    tasks = ("" if sizes else TASKS) if tasks is None else tasks
    chosen = list(known.TASKS) if tasks.strip() == "all" else known.split(tasks)
    wanted = parse_lengths(lengths)
    check_settings(chosen, wanted, samples, mode, sizes, steps)
    named = split_methods(methods)
    line_up(named, wanted, floor=not no_floor)
    for path in (json, html):
        if path is not None:
            check_writable(path)
    if json is not None and html is not None and json.absolute() == html.absolute():
        raise ValueError(f"--json and --html both name {json}: give two files")
    if resume and json is None:
        raise ValueError("--resume needs the file to go on with: give it as --json FILE")
    if html is not None:
        _check_report()
        if not chosen:
            raise ValueError("--html shows the quality of methods: name --tasks too, or leave it out")
    grammar(text)
    plans = [Plan.load(path) for path in plan or []]

    from saccade.evaluate.loading import load_model

    loaded, tokenizer = load_model(model, device=device, dtype=dtype, offline=offline)
    options = _options(device=device, dtype=dtype, text=text, plan=plan, offline=offline, no_floor=no_floor)
    try:
        result = _run(
            loaded, tokenizer, named, chosen, wanted, samples=samples, mode=mode, seed=seed, json_path=json,
            resume=resume, plans=plans, floor=not no_floor, text=text, name=model, options=options, batches=sizes, steps=steps,
        )  # fmt: skip
    except KeyboardInterrupt:
        if json is not None and json.exists():
            told = f"Stopped. What had run is in {json}; the same command with --resume goes on."
            console(stderr=True).print(told, markup=False, soft_wrap=True)
        raise
    if result["rows"]:
        write(table(result, console().width))
    if result.get("throughput"):
        write(speed_table(result))
    if html is not None:
        from saccade.report.comparison import write_page

        write_page(result, html)
    for what, path in (("Result", json), ("Page", html)):
        if path is not None:
            console().print(f"{what}: {path}", markup=False, soft_wrap=True)
    every = [*result["rows"], *result.get("throughput", [])]
    if all(row["status"] == "failed" for row in every):
        raise ValueError(f"every cell failed, the first one with: {every[0]['error']}")


def parse_lengths(text: str) -> list[int]:
    """`"1024,4K"` to `[1024, 4096]`. Raises ValueError for anything that is no positive whole number."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        number, factor = (part[:-1], 1024) if part[-1] in "kK" else (part, 1)
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"{part!r} is no length: write lengths as whole numbers of tokens, such as 1024,4K")
        found.append(int(number) * factor)
    if not found:
        raise ValueError("no lengths were given: write them like 1024,4K")
    return found


def parse_batches(text: str) -> list[int]:
    """`"1,4"` to `[1, 4]`. Raises ValueError for anything that is no positive whole number."""
    parts = [piece.strip() for piece in text.split(",") if piece.strip()]
    for part in parts:
        if not part.isdecimal() or int(part) < 1:
            raise ValueError(f"{part!r} is no batch size: write them as whole numbers, such as 1,4,16")
    return [int(part) for part in parts]


def _options(device: str | None, dtype: str | None, text: Path | None, plan: list[Path] | None, offline: bool, no_floor: bool) -> list[str]:
    """The arguments that the commands in the result must repeat."""
    words: list[str] = []
    for name, value in (("device", device), ("dtype", dtype), ("text", text), *(("plan", path) for path in plan or [])):
        words += [] if value is None else [f"--{name}", str(value)]
    return [*words, *(["--offline"] if offline else []), *(["--no-floor"] if no_floor else [])]


def _check_report() -> None:
    """Raise ImportError now rather than after the run."""
    from importlib.util import find_spec

    missing = [library for library in ("jinja2", "plotly") if find_spec(library) is None]
    if missing:
        raise ImportError(f"the page needs {' and '.join(missing)}: pip install 'saccade[report]', or leave --html out")


def _run(model: Any, tokenizer: Any, methods: list[str], tasks: list[str], lengths: list[int], **settings: Any) -> dict[str, Any]:
    """The comparison with progress bars on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from saccade.cli.console import console
    from saccade.evaluate.runner import Progress as Step
    from saccade.evaluate.runner import compare

    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        cells = bars.add_task("cells", total=None)
        inside = bars.add_task("", total=None)

        def show(step: Step) -> None:
            bars.update(cells, completed=step.done, total=step.total)
            bars.update(inside, description=step.doing, completed=max(0, step.sample - 1), total=step.samples or None)

        return compare(model, tokenizer, methods, tasks, lengths, progress=show, **settings)


def table(result: dict[str, Any], width: int) -> Group:
    """The rows of a result, a table for each task, length and mode. At 100 columns the peak memory is left out."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    model, env = result["model"], result["environment"]
    wide = width >= 112
    parts: list[Any] = [Text(f"{model['name']} on {env['device_name']}, {env['dtype']}, torch {env['torch']}", style="dim")]
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault((row["task"], row["length"], row["mode"]), []).append(row)
    # the same widths in every table, so that columns stand under each other
    names = max(len("method"), *(len(row["method"]) for row in result["rows"]))
    first = min(names, width - 74 - 10 * wide)
    for (task, length, mode), rows in groups.items():
        head = Text.assemble("\n", (task, "bold cyan"), f"  {length:,} tokens, {mode}")
        if rows[0]["unit"] == "bits":
            head.append("  bits per byte, lower is better", "dim")
        elif not any(row["discriminating"] for row in rows):
            head.append("  dense itself does not solve it: says little about methods", "yellow")
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("method", overflow="fold", width=first)
        for title, size_ in (
            ("score", 5),
            ("95%", 11),
            ("KV cache", 13),
            ("pairs", 9),
            ("prefill", 12),
            ("decode", 12),
        ):
            grid.add_column(title, justify="right", no_wrap=True, width=size_)
        if wide:
            grid.add_column("peak", justify="right", no_wrap=True, width=8)
        failed = []
        for row in rows:
            if row["status"] == "failed":
                failed.append(Text.assemble(row["method"], (f" failed: {row['error']}", "red")))
            else:
                grid.add_row(*_cells(row)[: 8 if wide else 7])
        parts += [head, grid, *failed]
    parts.append(Text(
        "\nKV cache: bytes, share of dense. pairs: query-key pairs read, prefill/decoding. x: speed against dense.",
        style="dim",
    ))  # fmt: skip
    return Group(*parts)


def speed_table(result: dict[str, Any]) -> Group:
    """Tokens per second of decoding by batch size, a table for each length."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = result["throughput"]
    sizes = sorted({row["batch"] for row in rows})
    parts: list[Any] = []
    for length in sorted({row["length"] for row in rows}):
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        grid.add_column("method", overflow="fold")
        for batch in sizes:
            grid.add_column(f"batch {batch}", justify="right")
        for title in ("KV cache a row", "step"):
            grid.add_column(title, justify="right", no_wrap=True)
        here = {(row["method"], row["batch"]): row for row in rows if row["length"] == length}
        failed = []
        for method in dict.fromkeys(method for method, _ in here):
            own = [here[method, batch] for batch in sizes if (method, batch) in here]
            known = [row for row in own if row["status"] == "ok"]
            cells = [_speed(here.get((method, batch))) for batch in sizes]
            facts = [size(known[-1]["kv_bytes"] // known[-1]["batch"]), f"{known[-1]['step_ms']:.1f} ms"] if known else ["-", "-"]
            grid.add_row(Text(method), *cells, *facts)
            broken = [row for row in own if row["status"] == "failed"]
            failed += [Text.assemble(method, (f" failed at batch {row['batch']}: {row['error']}", "red")) for row in broken]
        parts += [Text.assemble("\n", ("tokens per second", "bold cyan"), f"  decoding after {length:,} tokens"), grid, *failed]
    parts.append(Text("\nx: speed against dense. step: median of the largest batch that ran. full: out of memory.", style="dim"))
    return Group(*parts)


def _speed(row: dict[str, Any] | None) -> str:
    if row is None or row["status"] == "failed":
        return "-"
    if row["status"] == "full":
        return "full"
    return f"{row['tokens_per_second']:,.0f}" + ("" if row["speedup"] is None else f" {row['speedup']:.2f}x")


def _cells(row: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    digits = 3 if row["unit"] == "bits" else 2
    pairs = "/".join("-" if row[key] is None else f"{row[key]:.2f}" for key in ("prefill_density", "decode_density"))
    known, dense = row["kv_bytes"], row["kv_bytes_dense"]
    return [
        Text(row["method"], style="dim" if row["slug"] in ("dense", "random") else ""),
        "-" if row["score"] is None else f"{row['score']:.{digits}f}",
        "-" if row["low"] is None or row["high"] is None else f"{row['low']:.{digits}f}-{row['high']:.{digits}f}",
        size(known) + (f" {known / dense:4.0%}" if known is not None and dense else ""),
        pairs,
        _time(row, "prefill"),
        _time(row, "decode"),
        size(row["peak_bytes"]),
    ]


def _time(row: dict[str, Any], phase: str) -> str:
    value, ratio = row[f"{phase}_ms"], row[f"{phase}_speedup"]
    if value is None:
        return "-"
    shown = f"{value / 1e3:.1f}s" if value >= 10_000 else f"{value:.0f}ms" if value >= 100 else f"{value:.1f}ms"
    return shown if ratio is None else f"{shown} {ratio:.2f}x"


def size(n: int | None) -> str:
    """Bytes in the unit that suits them."""
    if n is None:
        return "-"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return f"{n} B"
