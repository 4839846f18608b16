"""The sets to train on, by name: `build_set({"set": "mqar", "pairs": 8})`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saccade.train.fields import nearest, read_fields
from saccade.train.sets.base import IGNORE, TokenSet
from saccade.train.sets.copying import SelectiveCopy
from saccade.train.sets.needles import Needles
from saccade.train.sets.recall import Recall
from saccade.train.sets.regression import Regression
from saccade.train.sets.tracking import StateTracking
from saccade.train.sets.windows import ByteText

SETS: dict[str, type[TokenSet]] = {kind.name: kind for kind in (Recall, SelectiveCopy, StateTracking, Regression, Needles, ByteText)}


def build_set(description: Mapping[str, Any], where: str = "data", base: Path | None = None) -> TokenSet:
    """The set that `{"set": name, argument: value, ...}` describes; relative paths start from `base`.

    Raises ValueError or TypeError, in one sentence that begins with `where`, for unknown names (with the nearest ones), wrong types and
    values out of range.
    """
    if not isinstance(description, Mapping):
        raise TypeError(f"{where} is {description!r}, expected a mapping such as {{set: mqar, length: 256}}")
    given = dict(description)
    name = given.pop("set", None)
    if name is None:
        raise ValueError(f"{where} names no set: give set: one of {', '.join(SETS)}")
    if not isinstance(name, str) or name not in SETS:
        raise ValueError(f"{where} names the set {name!r}, which there is not: {nearest(str(name), SETS)}")
    return read_fields(SETS[name], given, where, base)


__all__ = [
    "IGNORE", "SETS", "ByteText", "Needles", "Recall", "Regression", "SelectiveCopy", "StateTracking", "TokenSet", "build_set",
]  # fmt: skip
