"""20,000 tokens through a cache of constant size: bytes, positions, logits, time a token, and a run that is stopped and taken up again."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import Session
from saccade.cache import KVLayer
from tests.contract.models import tiny

TOKENS, HALF, RESUMED = 20_000, 10_000, 2_000
EVERY = 256  # tokens after which snapkv acts again

# the policy, how many entries it leaves, and whether it is asked to act
RUNS = [
    ("streaming-llm(sinks=4, window=60)", 64, False),
    ("h2o(budget=64)", 64, False),
    ("snapkv(budget=64, window=16)", 64, True),
]


@dataclass
class Run:
    """Sampled text, one token at a time. token: the next to be fed. written: all that was fed after `begin`."""

    handle: Session
    cache: DynamicCache
    token: Tensor
    fed: int
    asked: bool
    written: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    bytes: list[tuple[int, int]] = field(default_factory=list)
    finite: bool = True

    @torch.no_grad()
    def go(self, until: int) -> None:
        while self.fed < until:
            began = time.process_time()
            logits = tiny("llama")(self.token, past_key_values=self.cache).logits[0, -1]
            self.fed += 1
            if self.asked and self.fed % EVERY == 0:
                self.handle.compress(self.cache)
            self.seconds.append(time.process_time() - began)
            self.written.append(int(self.token))
            self.finite = self.finite and bool(logits.isfinite().all())
            # what is drawn depends on every bit of the logits, and on nothing that a resumed run would not know
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(self.fed))
            self.token = drawn.clamp(min=3)[None]
            if self.fed % EVERY == 0:
                stats = self.handle.stats()
                self.bytes.append((stats.kv_bytes, stats.index_bytes))


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "size", "asked"), RUNS, ids=lambda x: x.partition("(")[0] if isinstance(x, str) else "")
def test_twenty_thousand_tokens(spec: str, size: int, asked: bool, tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "half.cache"
    first = torch.tensor([[5]])
    with saccade.attach(model, cache=spec) as handle:
        run = Run(handle, DynamicCache(config=model.config), first, 0, asked)
        run.go(HALF)
        handle.save(path)
        token = run.token.clone()
        run.go(TOKENS)

    assert run.finite
    assert run.cache.get_seq_length() == TOKENS
    early, late = run.bytes[4:12], run.bytes[-12:]
    assert set(late) == set(early) and len(set(late)) == 1, "the same bytes at the same phase, to the last"
    layer = run.cache.layers[1]
    assert isinstance(layer, KVLayer) and layer.tail is not None
    places = layer.positions()[0].tolist()
    newest = TOKENS - 1
    for head in places:
        assert head == sorted(set(head)) and head[-1] == newest and head[0] >= 0
        if spec.startswith("streaming"):
            assert head == [*range(4), *range(newest - 59, newest + 1)]
        else:
            # generated tokens since snapkv last acted are all there
            recent = 32 if spec.startswith("h2o") else 16 + TOKENS % EVERY
            assert head[-recent:] == list(range(newest - recent + 1, newest + 1))
            assert len(head) == size + (TOKENS % EVERY if asked else 0)
    # a key of the first layer is made of its token and its place alone
    alone: Any = model(torch.tensor([[run.written[-1]]]), position_ids=torch.tensor([[newest]])).past_key_values.layers[0]
    held: Any = run.cache.layers[0]
    assert torch.allclose(held.keys[:, :, -1], alone.keys[:, :, -1], atol=1e-6)
    pace = [statistics.median(part) for part in (run.seconds[1000:4000], run.seconds[-3000:])]
    assert pace[1] < 1.5 * pace[0], "no token costs more than one at the start"

    with saccade.attach(model, cache=spec) as handle:
        again = Run(handle, saccade.load_cache(path, model), token, HALF, asked)
        again.go(HALF + RESUMED)
    assert again.written == run.written[HALF : HALF + RESUMED]
    assert len(set(again.written)) > 20, "a text in which every token is the same shows nothing"


SHORT = [RUNS[0], *(pytest.param(*run, marks=pytest.mark.slow) for run in RUNS[1:])]


@pytest.mark.parametrize(("spec", "size", "asked"), SHORT, ids=lambda x: x.partition("(")[0] if isinstance(x, str) else "")
def test_a_short_run_is_taken_up_where_it_stopped(spec: str, size: int, asked: bool, tmp_path: Path) -> None:
    """The same in 300 tokens, stopped between two compressions, and from a copy in memory too."""
    model, path = tiny("llama"), tmp_path / "half.cache"
    with saccade.attach(model, cache=spec) as handle:
        run = Run(handle, DynamicCache(config=model.config), torch.tensor([[5]]), 0, asked)
        run.go(270)
        handle.save(path)
        token, kept = run.token.clone(), copy.deepcopy(run.cache)
        run.go(300)
        assert handle.stats().kept == [[size + (300 - EVERY) * asked] * 2] * 2
    for cache in (saccade.load_cache(path, model), kept):
        with saccade.attach(model, cache=spec) as handle:
            again = Run(handle, cache, token, 270, asked)
            again.go(300)
        assert again.written == run.written[270:] and torch.equal(again.token, run.token)
