"""The pocket model, loaded once, and methods made for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.core import REGISTRY, CachePolicy, Info, LayerContext, Prefill, Selection, StoredKV
from saccade.evaluate.loading import load_model
from saccade.evaluate.prompts import Codec


@dataclass(frozen=True, kw_only=True)
class Ends(CachePolicy):
    """Keeps the first `first` and last `last` entries, and notes how many tokens it had seen whenever it acted."""

    first: int = 4
    last: int = 64
    info = Info(slug="test-ends", phase="cache", frees_memory=True)
    acted: Any = None

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if self.acted is not None:
            self.acted.append((ctx.layer, ctx.seen))
        n = kv.length
        if n > self.first + self.last:
            kept = torch.cat([torch.arange(self.first), torch.arange(n - self.last, n)])
            kv.keep(kept.expand(kv.keys.shape[0], kv.heads, -1))


@dataclass(frozen=True, kw_only=True)
class Near(Prefill):
    """Every query reads itself and the `size` - 1 keys before it."""

    size: int = 16
    info = Info(slug="test-near", phase="prefill")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.window(q.shape[2], k.shape[2], self.size, block_q=1, block_k=1)


@dataclass(frozen=True, kw_only=True)
class Broken(CachePolicy):
    """Fails when it has to act."""

    info = Info(slug="test-broken", phase="cache")

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        raise RuntimeError("this policy\nis broken")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(REGISTRY, "test-broken", Broken)
    yield "test-broken"


@pytest.fixture(scope="session")
def pocket() -> tuple[PreTrainedModel, Any]:
    torch.set_num_threads(1)
    return load_model("pocket", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def codec(pocket: tuple[PreTrainedModel, Any]) -> Codec:
    return Codec(pocket[1])
