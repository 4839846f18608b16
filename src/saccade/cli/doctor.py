"""`saccade doctor`: what this machine has, and what it can therefore run."""

from __future__ import annotations

import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

# (lowest, highest) minor versions that the tests ran with
TESTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 23))}


@dataclass(frozen=True)
class Check:
    """One thing looked for. found: its version or description, "" when missing. note: what it gives or what to know.
    install: how to get it, "" when there is nothing to do."""

    group: str
    name: str
    found: str
    note: str = ""
    install: str = ""


@dataclass(frozen=True)
class Run:
    """One implementation of an op. runs: whether it can here; why: where, or what is in the way."""

    op: str
    impl: str
    runs: bool
    why: str


def command(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Say what is installed and what can run here."""
    from saccade.cli.console import write, write_json

    checks = [*_libraries(), *_machine(), *_optional()]
    runs = implementations()
    if json:
        write_json({"checks": [asdict(check) for check in checks], "runs": [asdict(run) for run in runs]})
        return
    write(_render(checks, runs))


def tested(package: str, found: str) -> str:
    """Whether a version is inside the tested range, in words."""
    low, high = TESTED[package]
    match = re.match(r"(\d+)\.(\d+)", found)
    inside = match is not None and low <= (int(match[1]), int(match[2])) <= high
    span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    return f"inside the tested range {span}" if inside else f"outside the tested range {span}: results may differ"


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _libraries() -> list[Check]:
    checks = [Check("required", "python", platform.python_version(), "3.11 or newer")]
    for package in TESTED:
        found = _installed(package)
        note = tested(package, found) if found else "saccade can't run without it"
        checks.append(Check("required", package, found, note, "" if found else f"pip install {package}"))
    return checks


def _machine() -> list[Check]:
    import torch

    # newer torch says more about the CPU than the name of its best vector set
    abilities = getattr(torch.cpu, "get_capabilities", dict)()
    fast = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if abilities.get(name)]
    kernels = f"kernels for {torch.backends.cpu.get_cpu_capability()}{', has ' if fast else ''}{', '.join(fast)}"
    bf16 = {"avx512_bf16", "amx_bf16"} & set(fast)
    checks = [
        Check("machine", "cpu", str(abilities.get("cpu_name") or platform.machine()),
              f"{os.cpu_count()} logical cores, torch uses {torch.get_num_threads()} threads; {kernels}"),
        Check("machine", "bf16 on cpu", "in hardware" if bf16 else "emulated",
              "faster than float32 here" if bf16 else "float32 is the faster choice here"),
    ]
    gpus = range(torch.cuda.device_count())
    for index in gpus:
        facts = torch.cuda.get_device_properties(index)
        note = f"{facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
        checks.append(Check("machine", f"gpu {index}", facts.name, note))
    if not gpus:
        built = torch.version.cuda or torch.version.hip
        note = "torch sees none" if built else "this torch was built without CUDA"
        checks.append(Check("machine", "gpu", "", f"{note}; everything runs on the CPU"))
    compiler = _compiler()
    checks += [
        Check("machine", "triton", _installed("triton"), "compiled kernels on GPUs",
              "" if _installed("triton") else "comes with torch's CUDA builds"),
        Check("machine", "c++ compiler", compiler, "torch.compile and FlexAttention on the CPU",
              "" if compiler else "apt-get install g++ (or set CXX)"),
    ]
    return checks


def _optional() -> list[Check]:
    wanted = (
        ("plotly", "plotly", "the charts in reports", "pip install 'saccade[report]'"),
        ("jinja2", "jinja2", "the pages of reports", "pip install 'saccade[report]'"),
        ("faiss", "faiss-cpu", "nearest-neighbour indexes for retrieval methods", "pip install 'saccade[ann]'"),
        ("fla", "flash-linear-attention", "a peer in benchmarks", "pip install 'saccade[bench]'"),
        ("sageattention", "sageattention", "a peer in benchmarks", "pip install 'saccade[bench]'"),
        ("playwright", "playwright", "the browser tests", "pip install 'saccade[dev]'"),
    )
    checks = []
    for name, package, gives, install in wanted:
        found = _installed(package)
        checks.append(Check("optional", name, found, gives, "" if found else install))
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
    install = "" if browser else "apt-get install chromium"
    return [*checks, Check("optional", "chromium", browser, "the browser tests", install)]


def _compiler() -> str:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["g++", "clang++"])), "")


def implementations() -> list[Run]:
    """Each implementation of the ops: whether it runs here, and why or why not."""
    import torch

    gpu = torch.cuda.is_available()
    runs = [
        Run("attend", "reference", True, "plain torch, any device and dtype; slow, the others are tested against it"),
        Run("attend", "cpu", True, "gathers the chosen keys; plain torch, made for CPUs"),
    ]
    if gpu and _installed("triton"):
        runs.append(Run("attend", "flex", True, "compiled by torch with Triton, on the GPU"))
    elif _compiler():
        runs.append(Run("attend", "flex", True, f"compiled by torch with {os.path.basename(_compiler())}, on the CPU"))
    else:
        runs.append(Run("attend", "flex", False, "needs a C++ compiler (CPU) or Triton and a GPU"))
    why = "" if _installed("triton") else "needs Triton"
    if not gpu:
        why = "needs a GPU that torch can see"
    runs += [
        Run("decode", "reference", True, "plain torch"),
        Run("decode", "cpu", True, "gathers the chosen keys; packed caches in chunks"),
        Run("estimate", "torch", True, "plain torch"),
        Run("scan", "reference", True, "token by token"),
        Run("scan", "chunked", True, "plain torch, any device"),
    ]
    runs += [Run(op, "triton", not why, why or "kernels for the GPU") for op in ("attend", "decode", "estimate", "scan")]
    return runs


def _render(checks: list[Check], runs: list[Run]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for group in dict.fromkeys(check.group for check in checks):
        table = Table.grid(padding=(0, 2))
        for style in ("", "", "dim"):
            table.add_column(style=style, overflow="fold")
        for check in (check for check in checks if check.group == group):
            outside = check.note.startswith("outside")
            found = Text(check.found or "missing", style="yellow" if outside or not check.found else "green")
            table.add_row(f"  {check.name}", found, Text(check.note + (f"; {check.install}" if check.install else "")))
        parts += [Text(group, style="bold"), table, Text("")]
    table = Table.grid(padding=(0, 2))
    for run in runs:
        mark = Text("runs" if run.runs else "does not run", style="green" if run.runs else "yellow")
        table.add_row(f"  {run.op} {run.impl}", mark, Text(run.why, style="dim"))
    return Group(*parts, Text("what this machine can run", style="bold"), table)
