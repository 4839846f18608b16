"""Reading a comparison's result: what the page relies on is checked here, once, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

SCHEMA = "saccade.compare/1"

_TEXT = ("method", "slug", "task", "status", "unit", "command")
_NUMBERS = (
    "score",
    "low",
    "high",
    "prefill_density",
    "decode_density",
    "kv_bytes",
    "index_bytes",
    "kv_bytes_dense",
    "peak_bytes",
    "prefill_ms",
    "decode_ms",
    "prefill_speedup",
    "decode_speedup",
)
_LISTS = ("output_error", "mass")


def read(result: Any) -> dict[str, Any]:
    """A checked copy of a result of schema `saccade.compare/1`.

    Every row comes back with every key; numbers that are absent, infinite or NaN come back as None, so no later code
    meets them. Raises TypeError if `result` is not a dict, ValueError on another schema or on a row without what
    identifies it.
    """
    if not isinstance(result, dict):
        raise TypeError(f"a comparison's result is a dict, as read from its JSON file, not {type(result).__name__}")
    found = result.get("schema")
    if found != SCHEMA:
        raise ValueError(
            f"the result has schema {found!r}, this page reads {SCHEMA!r}: run saccade compare again with this version"
        )
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError("the result has no rows: nothing was compared, so there is nothing to show")
    clean = finite({key: value for key, value in result.items() if key not in ("rows", "attention")})
    for part in ("environment", "model", "settings"):
        clean[part] = {name: value for name, value in (clean.get(part) or {}).items() if value is not None}
    for part in ("created", "command"):
        clean[part] = str(clean.get(part) or "")
    clean["rows"] = [_row(index, row) for index, row in enumerate(rows)]
    clean["attention"] = result.get("attention")
    return clean


def _row(index: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(
            f"row {index} of the result is {type(row).__name__}, expected an object with at least method and task"
        )
    missing = [key for key in ("method", "task", "length", "status") if row.get(key) is None]
    if missing:
        raise ValueError(
            f"row {index} of the result lacks {', '.join(missing)}: the file is damaged or was written by hand"
        )
    if row["status"] not in ("ok", "failed"):
        raise ValueError(f"row {index} of the result has status {row['status']!r}, expected 'ok' or 'failed'")
    clean = finite(row)
    clean["slug"] = clean.get("slug") or str(row["method"]).partition("(")[0]
    clean["unit"] = clean.get("unit") or "accuracy"
    clean["command"] = clean.get("command") or ""
    for key in _TEXT:
        clean[key] = str(clean[key])
    clean["length"] = int(row["length"])
    clean["mode"] = str(clean.get("mode") or "")
    clean["error"] = None if clean.get("error") is None else str(clean["error"])
    clean["discriminating"] = bool(clean.get("discriminating", True))
    for key in _NUMBERS:
        clean[key] = _number(clean.get(key))
    for key in _LISTS:
        clean[key] = clean.get(key) or None
    clean["depths"] = clean.get("depths") or []
    return clean


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def finite(value: Any) -> Any:
    """The same tree with None for infinities and NaN: JSON has no word for them, and a browser refuses the file."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
