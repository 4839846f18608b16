"""`CudaGraphs` keeps the rules of the allocator, told by a stand-in for the CUDA runtime: this runs without a GPU."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from saccade.attach.recorded import CudaGraphs

POOLS: dict[int, weakref.WeakSet[Any]] = {}


class Graph:
    """As the caching allocator has it: a pool lives as long as a graph that uses it, and a handle whose pool is gone is refused."""

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        users = POOLS.get(pool)
        assert users is None or len(users), "use_count > 0 INTERNAL ASSERT FAILED"
        POOLS.setdefault(pool, weakref.WeakSet()).add(self)
        self.open = True

    def capture_end(self) -> None:
        assert self.open
        self.open = False

    def replay(self) -> None:
        assert not self.open


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    POOLS.clear()
    calls = {"handles": 0, "emptied": 0}

    def count(name: str) -> int:
        calls[name] += 1
        return calls[name]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: count("handles"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: count("emptied"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name in ("Stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: nullcontext())
    return calls


def test_a_recording_may_follow_one_that_is_gone(runtime: dict[str, int]) -> None:
    record = CudaGraphs(torch.device("cuda", 0))
    for i in range(4):
        replay = record(lambda i=i: i)
        assert replay() == i
        del replay
        gc.collect()
    assert runtime == {"handles": 1, "emptied": 1}
    assert len(POOLS[1]) == 1, "graphs that nobody replays are kept"


def test_a_step_that_fails_leaves_nothing_open(runtime: dict[str, int]) -> None:
    record = CudaGraphs(torch.device("cuda", 0))
    record(lambda: 0)

    def fails() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        record(fails)
    gc.collect()
    assert record(lambda: 1)() == 1 and runtime["handles"] == 2
