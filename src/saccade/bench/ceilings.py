"""What the machine can do at most, measured in the same run: copying memory, and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from saccade.bench.case import Settings
from saccade.bench.timing import once, take_turns


def measure(s: Settings) -> dict[str, float | None]:
    """copy: TB/s, bytes read and written. matmul: TFLOP/s of a square product in the run's dtype. None where it could not be measured."""
    try:
        n, side = (1 << 30, 8192) if s.cuda else (1 << 25, 768)
        a, b = (torch.zeros(n, dtype=torch.uint8, device=s.device) for _ in range(2))
        x, y = (s.normal(side, side) for _ in range(2))
        runs: dict[str, Callable[[], object]] = {"copy": lambda: b.copy_(a), "matmul": lambda: x @ y}
        estimates = {name: min(once(run, s.device)[0] for _ in range(2)) for name, run in runs.items()}
        times, _ = take_turns(runs, device=s.device, budget_ms=s.budget_ms, once_ms=estimates)
        amounts = {"copy": 2 * n, "matmul": 2 * side**3}
        return {name: amounts[name] / times[name].median / 1e9 if name in times else None for name in runs}
    except RuntimeError:  # too little memory, or a dtype without products
        return {"copy": None, "matmul": None}
