"""Which layer gets which mixer: the usual ways to interleave exact attention with something cheaper."""

from __future__ import annotations

import re


def schedule(pattern: str, layers: int, cheap: str, exact: str = "softmax") -> list[str]:
    """One spec a layer.

    pattern: "3:1": after every three cheap layers one exact one, at the indices i with (i + 1) mod 4 = 0 (hybrid-linear-analysis,
    kimi-linear); "1:0" or "pure": cheap alone; "0:1": exact alone; "bookend:2": two exact layers at each end (lt2); "at:0,7,15": exact
    at these indices. Raises ValueError for other patterns and for indices that don't exist.
    """
    if layers < 1:
        raise ValueError(f"layers={layers}: give at least one")
    if pattern == "pure":
        return [cheap] * layers
    if found := re.fullmatch(r"(\d+):(\d+)", pattern):
        many, few = int(found[1]), int(found[2])
        if many + few == 0:
            raise ValueError("0:0 names no layer: give at least one number above 0")
        return [exact if index % (many + few) >= many else cheap for index in range(layers)]
    if found := re.fullmatch(r"bookend:(\d+)", pattern):
        ends = int(found[1])
        return [exact if index < ends or index >= layers - ends else cheap for index in range(layers)]
    if found := re.fullmatch(r"at:(\d+(?:,\d+)*)", pattern):
        chosen = {int(index) for index in found[1].split(",")}
        if max(chosen) >= layers:
            raise ValueError(f"{pattern} names layer {max(chosen)}, and there are {layers}: count from 0")
        return [exact if index in chosen else cheap for index in range(layers)]
    raise ValueError(f"pattern {pattern!r} is not known: use '3:1', 'pure', 'bookend:2' or 'at:0,7,15'")
