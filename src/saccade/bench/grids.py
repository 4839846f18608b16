"""The grids: which cases an op is measured on."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from saccade.bench.case import Case

OPS = ("attend", "decode", "estimate", "scan", "quant", "prefill", "step", "mixer")
GRIDS = ("quick", "bars", "full")
LIMITS_S = {"quick": 46.0, "bars": 150.0, "full": 320.0}
ASKED_LIMIT_S = 1800.0  # of cases that were asked for one by one
BUDGETS_MS = {"quick": 60.0, "bars": 100.0, "full": 150.0}
CPU_BUDGETS_MS = {"quick": 25.0, "bars": 500.0, "full": 500.0}


def _module(op: str) -> Any:
    if op not in OPS:
        raise ValueError(f"{op!r} is no op that is benchmarked: choose one of {', '.join(OPS)}")
    return import_module(f"saccade.bench.{op}_cases")


def cases(op: str, grid: str, *, cuda: bool, only: Sequence[str] = ()) -> list[Case]:
    """The cases of a grid, or of some of its families. Raises ValueError for names that don't exist, with the nearest one."""
    if grid not in GRIDS:
        raise ValueError(f"{grid!r} is no grid: choose one of {', '.join(GRIDS)}")
    found = _module(op).cases(grid, cuda)
    families = list(dict.fromkeys(case.family for case in found))
    for name in only:
        if name not in families:
            near = difflib.get_close_matches(name, families, 1)
            raise ValueError(
                f"{name!r} is no family of cases in {op} --grid {grid}{f', do you mean {near[0]!r}?' if near else ''}; "
                f"there are {', '.join(families)}"
            )
    return [case for case in found if not only or case.family in only]


def single(op: str, what: str | None, shape: dict[str, int]) -> Case:
    """One case of estimate, scan or quant; `what` names the function or the form, the first one by default."""
    module = _module(op)
    default = {"estimate": "pooled scores", "scan": "gated delta", "quant": "pack 4 bits"}[op]
    make: Callable[..., Case] = module.case
    known = module.Shape.__dataclass_fields__
    for name in shape:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')} is no option of {op}: it takes {', '.join(f'--{x}' for x in known)}")
    made = module.Shape(**shape)
    if made.heads % getattr(made, "kv_heads", 1):
        raise ValueError(f"{made.heads} query heads are no multiple of {made.kv_heads} key/value heads: give --kv-heads as well")
    return make(what or default, made)
