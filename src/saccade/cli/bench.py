"""`saccade bench`: kernels against dense attention and other libraries, in the same run."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from saccade.bench.case import Case, Settings


class Kind(StrEnum):
    attend = "attend"
    decode = "decode"
    estimate = "estimate"
    scan = "scan"
    quant = "quant"
    prefill = "prefill"
    step = "step"
    mixer = "mixer"


class Grid(StrEnum):
    quick = "quick"
    bars = "bars"
    full = "full"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_ASKED = (Kind.prefill, Kind.step, Kind.mixer)  # without a grid: what --methods, --lengths and so on ask for
_ABOUT = {
    Kind.attend: {"n": 8192, "heads": 8, "kv_heads": 8, "dim": 64, "density": 0.10, "tile": 128, "repeats": 7},
    Kind.decode: {"n": 32768, "heads": 8, "kv_heads": 8, "dim": 64, "selected": 1024, "page": 1, "repeats": 7},
}


def command(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="attend: a prompt; decode: one query over a cache; estimate, scan, quant. Whole methods: prefill, step, mixer."
        ),
    ],
    grid: Annotated[
        Grid | None, typer.Option("--grid", help="Many cases: quick in under a minute, bars (the marks) in two, full in a few.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only this family of the grid (repeatable); alone: the function or form to time.")
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="One case: tokens; attend 8192, decode 32768, else 2048.", min=1)] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="One case: query heads; default 8.", min=1)] = None,
    kv_heads: Annotated[int | None, typer.Option("--kv-heads", help="One case: key/value heads; default 8.", min=1)] = None,
    dim: Annotated[int | None, typer.Option("--dim", help="One case: channels per head; default 64.", min=8)] = None,
    density: Annotated[float | None, typer.Option("--density", help="attend: share of pairs read; default 0.1.", min=1e-4, max=1.0)] = None,
    tile: Annotated[int | None, typer.Option("--tile", help="attend: tile size on both sides; default 128.", min=1)] = None,
    selected: Annotated[int | None, typer.Option("--selected", help="decode: tokens read per head; default 1024.", min=1)] = None,
    page: Annotated[int | None, typer.Option("--page", help="decode: tokens are read in pages of this many; default 1.", min=1)] = None,
    dtype: Annotated[DType | None, typer.Option("--dtype", help="float32; bfloat16 for a grid on a GPU.")] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu or cuda; a grid takes the GPU if there is one.")] = None,
    impl: Annotated[str, typer.Option("--impl", help="What saccade's own calls ask for: auto, reference, cpu, triton.")] = "auto",
    repeats: Annotated[int | None, typer.Option("--repeats", help="attend, decode: rounds of the contestants; default 7.", min=1)] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 where a result of saccade is further off than allowed.")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result there; of a grid, after each case.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the charts of a grid there.")] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="An older result of the grid: say what got slower or faster.")] = None,
    fail_slower: Annotated[
        float | None, typer.Option("--fail-slower", help="With --compare: exit code 1 where saccade got slower by more per cent.", min=0)
    ] = None,
    limit: Annotated[float | None, typer.Option("--limit", help="Of a grid: begin nothing after so many seconds.", min=1)] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="prefill, step, mixer: specs separated by semicolons.")] = None,
    lengths: Annotated[str | None, typer.Option("--lengths", help="prefill, step, mixer: such as 32768,131072.")] = None,
    model_shape: Annotated[str | None, typer.Option("--shape", help="prefill, step: llama-8b (default on a GPU), qwen-7b, pocket.")] = None,
    inputs: Annotated[
        str | None, typer.Option("--inputs", help="prefill: captured from the pocket model (default), structured, random.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", help="prefill: time a random model of so many layers; step: 8; mixer: 2.", min=1)
    ] = None,
    batches: Annotated[str | None, typer.Option("--batches", help="step: sequences at once, such as 1,8; default 8.")] = None,
    whole: Annotated[bool, typer.Option("--whole", help="step: a whole model with random weights, not its attention alone.")] = False,
) -> None:  # fmt: skip
    """Time saccade's kernels against dense attention and other libraries in the same run.

    Without --grid one case is timed and printed as JSON. With it, a table: medians, rates, the time of the best dense kernel and of
    the best peer over saccade's, the error on a slice, and how times grow with the length. prefill, step and mixer give the table without
    a grid too.
    """
    import torch

    from saccade.core.files import check_writable

    given = {
        "n": n, "heads": heads, "kv_heads": kv_heads, "dim": dim, "density": density, "tile": tile, "selected": selected, "page": page,
        "repeats": repeats,
    }  # fmt: skip
    shape = {name: value for name, value in given.items() if value is not None}
    for path in filter(None, (json, html)):
        check_writable(path)
    if json is not None and html is not None and json.absolute() == html.absolute():
        raise ValueError(f"--json and --html both name {json}: give two files")
    in_table = grid is not None or kind in _ASKED
    device = device or ("cuda" if in_table and torch.cuda.is_available() else "cpu")
    _check_device(device)
    number = dtype or (DType.bfloat16 if in_table and device.startswith("cuda") else DType.float32)
    asked = {
        "methods": methods, "lengths": lengths, "shape": model_shape, "inputs": inputs, "layers": layers, "batches": batches,
        "whole": whole or None,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and (kind not in _ASKED or grid is not None):
        raise ValueError(f"--{next(iter(asked))} is for prefill, step and mixer without a grid: leave it out, or leave --grid out")
    if kind in _ASKED and grid is None and (case or shape):
        raise ValueError(f"--{'case' if case else next(iter(shape))} is not for {kind}: give --methods and --lengths")
    if not in_table:
        for option, value in (("--html", html), ("--compare", compare), ("--limit", limit)):
            if value is not None:
                raise ValueError(f"{option} goes with a grid: add --grid quick")
        _one(kind, shape, case, getattr(torch, number.value), device, impl, check, json)
        return
    if shape:
        raise ValueError(f"--{next(iter(shape)).replace('_', '-')} is for one case: leave it out, or leave --grid out")
    if fail_slower is not None and compare is None:
        raise ValueError("--fail-slower needs the result to compare with: give it as --compare FILE")
    if html is not None:
        _check_report()
    _grid(
        kind, grid, case or [], getattr(torch, number.value), device, impl, check=check, json=json, html=html, compare=compare,
        fail_slower=fail_slower, limit=limit, asked=asked,
    )  # fmt: skip


def _one(
    kind: Kind, shape: dict[str, Any], case: list[str] | None, dtype: Any, device: str, impl: str, check: bool, json: Path | None
) -> None:
    """One case, printed as JSON."""
    from saccade.cli.console import write_json

    if kind in _ABOUT:
        result = _plain(kind, shape, case, dtype, device, impl, check)
        bad = check and not result["check"]["ok"]
    else:
        from saccade.bench.case import Settings
        from saccade.bench.grids import single
        from saccade.bench.runner import bad_rows, run_cases

        if case and len(case) > 1:
            raise ValueError(f"--case is given {len(case)} times: without --grid one case is timed")
        settings = Settings(device=device, dtype=dtype, impl=impl, budget_ms=500, limit_s=600)
        chosen = single(kind.value, case[0] if case else None, {"n": 2048, **shape})
        words = _command(kind, case=case or [], **shape, dtype=str(dtype).removeprefix("torch."), device=device, impl=impl)
        result = run_cases(kind.value, "one case", [chosen], settings, command=words)
        if result["rows"][0]["status"] != "ok":
            raise ValueError(f"the case did not run: {result['rows'][0]['note']}")
        bad = check and bool(bad_rows(result))
    write_json(result)
    if json is not None:
        from saccade.bench.result import save

        save(result, json)
    if bad:
        raise typer.Exit(1)


def _plain(kind: Kind, given: dict[str, Any], case: list[str] | None, dtype: Any, device: str, impl: str, check: bool) -> dict[str, Any]:
    """The case of attend or decode: sparse against dense."""
    from saccade.bench.attend import bench_attend
    from saccade.bench.decode import bench_decode

    if case:
        raise ValueError(f"--case picks from a grid here: add --grid quick, or shape the one case of {kind} with --n, --heads and so on")
    shape = {**_ABOUT[kind], **{name: value for name, value in given.items() if name in _ABOUT[kind]}}
    if shape["n"] < 256:
        raise ValueError(f"--n {shape['n']}: attend and decode are timed from 256 tokens on")
    if shape["heads"] % shape["kv_heads"]:
        raise ValueError(f"--heads {shape['heads']} is not a multiple of --kv-heads {shape['kv_heads']}")
    options = {"dtype": dtype, "device": device, "impl": impl, "check": check}
    if kind is Kind.attend:
        return bench_attend(**shape, **options)
    if shape["selected"] > shape["n"]:
        raise ValueError(f"--selected {shape['selected']} is more than the {shape['n']} keys there are")
    return bench_decode(**shape, **options)


def _grid(
    kind: Kind, grid: Grid | None, only: list[str], dtype: Any, device: str, impl: str, *, check: bool, json: Path | None,
    html: Path | None, compare: Path | None, fail_slower: float | None, limit: float | None, asked: dict[str, Any],
) -> None:  # fmt: skip
    """A grid, or for prefill without one what was asked for."""
    from saccade.bench import grids, result
    from saccade.bench.case import Settings
    from saccade.bench.compare import compare as changes_since
    from saccade.bench.runner import bad_rows
    from saccade.bench.table import comparison_table, result_table
    from saccade.cli.console import console, write

    cuda = device.startswith("cuda")
    old = None if compare is None else result.load(compare)
    if old is not None and old["op"] != kind.value:
        raise ValueError(f"{compare} is a result of {old['op']}: compare {kind.value} with one of its own")
    if grid is None:
        from saccade.cli.bench_asked import asked_cases

        cases = asked_cases(kind.value, asked, cuda=cuda, size=dtype.itemsize)
    else:
        cases = grids.cases(kind.value, grid.value, cuda=cuda, only=only)
    size = ("full" if cuda else "quick") if grid is None else grid.value
    budgets = grids.BUDGETS_MS if cuda else grids.CPU_BUDGETS_MS
    patience = grids.ASKED_LIMIT_S if grid is None else grids.LIMITS_S[size]
    settings = Settings(device=device, dtype=dtype, impl=impl, budget_ms=budgets[size], limit_s=limit or patience)
    number = str(dtype).removeprefix("torch.")
    named = None if grid is None else grid.value
    words = _command(kind, grid=named, case=only, **asked, dtype=number, device=device, impl=impl, limit=limit, json=json, html=html)
    found = _measure(kind, named or "asked", cases, settings, words, json)
    write(result_table(found))
    if html is not None:
        from saccade.report.bench_page import write_page

        write_page(found, html)
    for what, path in (("Result", json), ("Page", html)):
        if path is not None:
            console().print(f"{what}: {path}", markup=False, soft_wrap=True)
    wrong = bad_rows(found) if check else []
    slower = []
    if old is not None and compare is not None:
        comparison = changes_since(old, found)
        write(comparison_table(comparison, str(compare)))
        slower = [] if fail_slower is None else comparison.slower_than(fail_slower)
    ours = [row for row in found["rows"] if row["role"] == "ours"]
    if all(row["status"] != "ok" for row in ours):
        raise ValueError(f"no case ran, the first one said: {ours[0]['note']}")
    told = console(stderr=True)
    if wrong:
        first = wrong[0]["family"]
        told.print(f"{len(wrong)} rows of saccade failed or are further off than allowed, first {first}", style="red", markup=False)
    if slower:
        told.print(f"{len(slower)} rows of saccade got slower by more than {fail_slower:g} %", style="red", markup=False)
    if wrong or slower:
        raise typer.Exit(1)


def _measure(kind: Kind, grid: str, cases: list[Case], settings: Settings, words: str, json: Path | None) -> dict[str, Any]:
    """The grid with a progress bar on stderr; the file is written after each case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from saccade.bench.result import save
    from saccade.bench.runner import run_cases
    from saccade.cli.console import console

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    try:
        with Progress(*columns, console=console(stderr=True), transient=True) as bars:
            task = bars.add_task("", total=len(cases))
            return run_cases(
                kind.value, grid, cases, settings, command=words,
                save=None if json is None else lambda document: save(document, json),
                progress=lambda done, total, doing: bars.update(task, completed=done, total=total, description=doing),
            )  # fmt: skip
    except KeyboardInterrupt:
        if json is not None and json.exists():
            console(stderr=True).print(f"Stopped. What had run is in {json}.", markup=False, soft_wrap=True)
        raise


def _command(kind: Kind, *, case: list[str], **options: Any) -> str:
    words = ["saccade", "bench", kind.value]
    for name, value in options.items():
        words += [] if value is None else [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    for name in case:
        words += ["--case", name]
    return shlex.join(words)


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device}: give cpu, cuda or cuda:N") from None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device {device}: benchmarks run on cpu and cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this machine has no CUDA GPU that torch can use")


def _check_report() -> None:
    """Raise ImportError now rather than after the run."""
    from importlib.util import find_spec

    missing = [library for library in ("jinja2", "plotly") if find_spec(library) is None]
    if missing:
        raise ImportError(f"the page needs {' and '.join(missing)}: pip install 'saccade[report]', or leave --html out")
