"""Paired timing: the contestants take turns, so that a machine whose speed drifts does not favour one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def paired_ms(contestants: dict[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each contestant over `repeats` rounds in turn, after one warm-up each."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            times[name].append((time.perf_counter() - begin) * 1000)
    return times


def summary(times: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each, and the median of the baseline's time over its own, round by round."""
    return {
        name: {
            "median_ms": statistics.median(values),
            "min_ms": min(values),
            "max_ms": max(values),
            "speedup": statistics.median(b / v for b, v in zip(times[baseline], values, strict=True)),
        }
        for name, values in times.items()
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": device, "device_name": name, "threads": torch.get_num_threads()}
