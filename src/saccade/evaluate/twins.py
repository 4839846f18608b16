"""Random twins: what reads as much as a method does, chosen at random, and whether the method does worse than that."""

from __future__ import annotations

import math
from typing import Any

from saccade.core import format_spec
from saccade.evaluate.contenders import Contender
from saccade.evaluate.result import key_of

STEP = 1.1  # twins stand at the powers of this, so that methods of nearly equal density share one
FULL = 0.97  # above it there is nothing left to choose


def twin_of(kind: str, row: dict[str, Any], found: Contender) -> str | None:
    """The spec of the row's random twin; None where it reads nearly everything, or stores everything in fewer bits.

    Prefill methods have random tiles of the density that was measured, the others random eviction down to the share they read or keep.
    """
    if kind == "prefill":
        share, slug, name = row["prefill_density"], "random-tiles", "density"
    else:
        share, slug, name = _read(row, found), "random", "budget"
    if share is None or not 0 < share < FULL:
        return None
    return format_spec(slug, {name: round(STEP ** round(math.log(share) / math.log(STEP)), 4)})


def _read(row: dict[str, Any], found: Contender) -> float | None:
    if "decode" in found.methods:
        return row["decode_density"]
    encoded = any(method.info.encodes for method in found.members)
    return None if encoded or not row["kv_bytes_dense"] else row["kv_bytes"] / row["kv_bytes_dense"]


def judge(rows: list[dict[str, Any]]) -> None:
    """Set "worse" in every row that has a twin: whether the twin scores better on a task that dense attention solves."""
    by_key = {key_of(row): row for row in rows if row["status"] == "ok"}
    for row in rows:
        twin = by_key.get((row.get("twin"), *key_of(row)[1:]))  # type: ignore[arg-type]
        if row["status"] != "ok" or twin is None or not row["discriminating"]:
            row["worse"] = None
        else:
            row["worse"] = row["score"] > twin["score"] if row["unit"] == "bits" else row["score"] < twin["score"]


def worse_than_random(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each row that does worse than its twin, the widest gaps first; gaps within the intervals are marked."""
    by_key = {key_of(row): row for row in rows}
    found = []
    for row in rows:
        if row.get("worse"):
            twin = by_key[(row["twin"], *key_of(row)[1:])]
            sign = -1 if row["unit"] == "bits" else 1
            apart = row["low"] > twin["high"] if row["unit"] == "bits" else row["high"] < twin["low"]
            digits = 3 if row["unit"] == "bits" else 2
            text = (
                f"{row['method']}: {row['task']} at {row['length']}, {row['mode']}: {row['score']:.{digits}f}, "
                f"{row['twin']} {twin['score']:.{digits}f}"
            )
            found.append((sign * (row["score"] - twin["score"]), text + ("" if apart else " (within the intervals)")))
    return [text for _, text in sorted(found)]
