"""The result of a grid, schema "saccade.bench/1": written after each case, read again for comparisons and pages.

op, grid, created, command, environment, settings, ceilings {copy TB/s, matmul TFLOP/s}, libraries {name: version or why absent},
seconds, complete, growth (see `saccade.bench.growth`), and rows, one for each case and contestant:

| field | meaning |
|---|---|
| op, family, case | what was measured; case holds n, heads, dim and what else identifies it |
| contestant, role | "saccade" or a peer; ours, dense (what ratios are taken against) or peer (the same work by others) |
| impl | the implementation that ran |
| status, note | ok, skipped or failed, and why |
| ms, ms_low, ms_high, repeats | median, 20th and 80th percentile |
| selection_ms | choosing what to read, where the case includes it; not part of ms |
| first_call_ms | the first call, compiling included |
| flops, bytes, work, unit, rate, rate_unit | what has to be done at least; `work` is the one in `unit`; rate in TFLOP/s or TB/s |
| intensity, tflops | FLOPs a byte, and the rate in FLOPs whatever the unit: for the roofline |
| ratio | time of the best dense contestant of the case over ms + selection_ms; ratio_peer: the same for the best peer |
| density | pairs read of pairs visible |
| peak_bytes | CUDA: most memory in use beyond what was there before a call; null on a CPU |
| error, allowed, ok | relative L2 error on a slice against float64, what is allowed, and whether it holds; null where not checked |
"""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from saccade.bench.case import Settings
from saccade.bench.timing import environment
from saccade.core.files import atomic_write

SCHEMA = "saccade.bench/1"
NUMBERS = (
    "ms", "ms_low", "ms_high", "repeats", "selection_ms", "first_call_ms", "flops", "bytes", "work", "rate", "intensity", "tflops", "ratio",
    "ratio_peer", "density", "peak_bytes", "error", "allowed",
)  # fmt: skip
TEXTS = ("op", "family", "contestant", "role", "impl", "status", "note", "unit", "rate_unit")


def new(op: str, grid: str, settings: Settings, command: str) -> dict[str, Any]:
    """An empty result."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "schema": SCHEMA, "op": op, "grid": grid, "created": datetime.now().astimezone().isoformat(timespec="seconds"), "command": command,
        "environment": {**environment(settings.device), "triton": triton, "cuda": torch.version.cuda, "python": sys.version.split()[0]},
        "settings": {
            "dtype": str(settings.dtype).removeprefix("torch."), "impl": settings.impl, "budget_ms": settings.budget_ms,
            "limit_s": settings.limit_s,
        },
        "ceilings": {"copy": None, "matmul": None}, "libraries": {}, "seconds": 0.0, "complete": False, "growth": [], "rows": [],
    }  # fmt: skip


def row(**fields: Any) -> dict[str, Any]:
    """A row with every field; what is not given is null, or "" for a text."""
    empty: dict[str, Any] = {**dict.fromkeys(TEXTS, ""), "case": {}, **dict.fromkeys(NUMBERS), "ok": None}
    unknown = set(fields) - set(empty)
    if unknown:
        raise ValueError(f"a row has no {', '.join(sorted(unknown))}")
    return {**empty, **{key: _finite(value) for key, value in fields.items()}}


def _finite(value: Any) -> Any:
    # JSON has no infinities: an error that is no number is a very large one
    return 1e30 if isinstance(value, float) and not math.isfinite(value) else value


def save(result: dict[str, Any], path: str | Path) -> None:
    """At once or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: str | Path) -> dict[str, Any]:
    """A result from its file. Raises ValueError, in one sentence, where it is none."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is not JSON: give a file that saccade bench --grid ... --json wrote") from None
    return read(document, str(path))


def read(result: Any, name: str = "the result") -> dict[str, Any]:
    """A checked copy: every row has every field. Raises TypeError or ValueError on what is no result of this schema."""
    if not isinstance(result, dict):
        raise TypeError(f"{name} is {type(result).__name__}, expected an object of schema {SCHEMA!r}")
    if result.get("schema") != SCHEMA:
        raise ValueError(
            f"{name} has schema {result.get('schema')!r}, expected {SCHEMA!r}: write one with saccade bench OP --grid quick --json F"
        )
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} has no rows: nothing was measured")
    for index, found in enumerate(rows):
        if not isinstance(found, dict) or not isinstance(found.get("case"), dict):
            raise ValueError(f"row {index} of {name} is no object with a case: the file is damaged")
        for key in ("op", "family", "contestant", "status"):
            if not isinstance(found.get(key), str):
                raise ValueError(f"row {index} of {name} has {key} {found.get(key)!r}, expected a text: the file is damaged")
        for key in NUMBERS:
            value = found.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)):
                raise ValueError(f"row {index} of {name} has {key} {value!r}, expected a number or null: the file is damaged")
    clean = {**new_defaults(), **result}
    clean["rows"] = [row(**{key: value for key, value in found.items() if key in _KNOWN}) for found in rows]
    return clean


_KNOWN = {*TEXTS, *NUMBERS, "case", "ok"}


def new_defaults() -> dict[str, Any]:
    return {
        "op": "", "grid": "", "created": "", "command": "", "environment": {}, "settings": {}, "ceilings": {}, "libraries": {},
        "growth": [], "seconds": 0.0, "complete": True,
    }  # fmt: skip
