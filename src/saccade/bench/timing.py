"""Timing in turns: the contestants run one after the other, round by round, so that a machine whose speed drifts favours none."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

# bytes written before each run on a GPU: more than its L2 cache holds, and enough that the host is ready when the GPU is
FLUSH = 1 << 29
CYCLES = 2_000_000  # of a GPU in a millisecond, at most
LEAST, MOST = 3, 100  # repeats


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds: the median, and the 20th and 80th percentile, of `repeats` runs."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, values: list[float]) -> Times:
        ordered = sorted(values)
        return cls(
            median=statistics.median(ordered), low=percentile(ordered, 0.2), high=percentile(ordered, 0.8), repeats=len(ordered)
        )


def percentile(ordered: list[float], share: float) -> float:
    """Linear between the two nearest of the sorted values."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def take_turns(
    runs: dict[str, Callable[[], object]], *, device: str, budget_ms: float, once_ms: dict[str, float],
    ahead_ms: Mapping[str, float] = MappingProxyType({}),
) -> tuple[dict[str, Times], dict[str, Exception]]:  # fmt: skip
    """Times of each contestant in rounds, and what those that raised said.

    Every one has run before, taking about `once_ms`; each gets so many repeats, LEAST to MOST, as fit `budget_ms`. A GPU is timed
    with events, and its L2 cache is overwritten before each run. Where a contestant gives `ahead_ms` it is kept busy for so long: the
    host has queued the run's launches by then, and what is timed is the GPU's work alone; every run then begins on an idle GPU, for
    what is still queued would hide the host's part of the next one. A CPU is timed with perf_counter.
    """
    counts = {name: min(MOST, max(LEAST, int(budget_ms / max(once_ms[name], 1e-6)))) for name in runs}
    cuda = device.startswith("cuda")
    flush = torch.empty(FLUSH, dtype=torch.int8, device=device) if cuda else None
    idle = any(ahead_ms.values())
    taken: dict[str, list[Callable[[], float]]] = {name: [] for name in runs}
    failed: dict[str, Exception] = {}
    for turn in range(max(counts.values(), default=0)):
        for name, run in runs.items():
            if turn >= counts[name] or name in failed:
                continue
            try:
                if cuda and idle:
                    torch.cuda.synchronize()
                taken[name].append(_on_gpu(run, flush, ahead_ms.get(name, 0.0)) if flush is not None else _on_cpu(run))
            except Exception as error:  # the others go on
                failed[name] = error
    if cuda:
        torch.cuda.synchronize()
    return {name: Times.of([read() for read in reads]) for name, reads in taken.items() if name not in failed}, failed


def _on_gpu(run: Callable[[], object], flush: torch.Tensor, ahead_ms: float) -> Callable[[], float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead_ms:
        # one launch, as the queue of launches is short
        torch.cuda._sleep(int(ahead_ms * CYCLES))
    flush.zero_()
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end)


def _on_cpu(run: Callable[[], object]) -> Callable[[], float]:
    begin = time.perf_counter()
    run()
    passed = (time.perf_counter() - begin) * 1000
    return lambda: passed


def once(run: Callable[[], object], device: str) -> tuple[float, object]:
    """Milliseconds of one run by the wall clock, the device waited for, and what it returned."""
    wait(device)
    begin = time.perf_counter()
    out = run()
    wait(device)
    return (time.perf_counter() - begin) * 1000, out


def paired_ms(contestants: dict[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each contestant over `repeats` rounds in turn, after one warm-up each."""
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            times[name].append(once(run, device)[0])
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


def wait(device: str) -> None:
    """Until the device has nothing left to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def environment(device: str) -> dict[str, object]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": device, "device_name": name, "threads": torch.get_num_threads()}


def recorded(run: Callable[[], object]) -> Callable[[], object] | None:
    """The GPU work of one run as a CUDA graph to be replayed, without anything the host does; None where it can't be recorded.

    A run that asks the GPU for a value can't. One that keeps books on the host does so once, when it is recorded. What it reads is kept
    as long as the graph: a run that replaces its state by a new one would leave the graph with memory that is given back.
    """
    run()  # kernels are compiled, caches made
    torch.cuda.synchronize()
    read = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.is_cuda]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # the capture is given up, and the GPU goes on
        torch.cuda.synchronize()
        return None

    def replay(_read: list[torch.Tensor] = read) -> None:
        graph.replay()

    return replay
