"""Peak memory of a prompt that comes in chunks: lower where a policy acts after every chunk than where it acts at the end."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.cache import KVLayer
from tests.attach.live_bytes import LiveBytes
from tests.contract.harness import tokens
from tests.contract.models import tiny

N, CHUNK, BUDGET, LAYERS = 2400, 100, 240, 2
TOKEN = 2 * 2 * 16 * 4  # bytes of a token's keys and values in a layer: two heads of 16 channels in float32
ROOM = 64  # tokens of spare room that a growing cache takes
POLICIES = [f"snapkv(budget={BUDGET}, window=16)", f"streaming-llm(sinks=4, window={BUDGET - 4})"]


@dataclass(frozen=True)
class Peaks:
    """Bytes: of keys and values at the worst moment and at the end, and of all tensors that the run made, at its worst moment."""

    cache: int
    left: int
    tensors: int


@torch.no_grad()
def peaks(monkeypatch: pytest.MonkeyPatch, policy: str | None, when: str) -> Peaks:
    model, ids, worst = tiny("llama"), tokens(1, N), 0
    plain = KVLayer.update

    def update(self: KVLayer, *args: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        nonlocal worst
        out = plain(self, *args, **options)
        # a layer holds most when its chunk has come and the policy has not acted on it yet
        worst = max(worst, held(cache))
        return out

    monkeypatch.setattr(KVLayer, "update", update)
    gc.collect()
    with saccade.attach(model, cache=policy, when=when) as handle, LiveBytes(*model.parameters(), ids) as tensors:
        cache = DynamicCache(config=model.config)
        for part in ids.split(CHUNK, 1):
            model(part, past_key_values=cache, logits_to_keep=1)
        worst = max(worst, held(cache))
        handle.compress(cache)
        left = held(cache)
        assert left == handle.stats().kv_bytes
    return Peaks(worst, left, tensors.peak)


def held(cache: DynamicCache) -> int:
    return sum(layer.kv_bytes for layer in cache.layers if isinstance(layer, KVLayer))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda spec: spec.partition("(")[0])
def test_a_policy_that_acts_on_each_chunk_never_holds_the_prompt(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = peaks(monkeypatch, None, "prompt")
    late, early = peaks(monkeypatch, policy, "prompt"), peaks(monkeypatch, policy, "call")
    whole, budget = LAYERS * N * TOKEN, LAYERS * BUDGET * TOKEN
    assert dense.cache >= whole and late.cache >= whole, "a policy that acts at the end has all of the prompt before it"
    assert late.left == early.left == budget
    # one layer after the other: only one of them has a chunk that was not compressed yet
    assert early.cache <= budget + (CHUNK + ROOM) * TOKEN
    assert early.cache < 0.2 * late.cache
    # what the process holds in all, activations included, falls by what the cache falls
    assert late.tensors - early.tensors > 0.9 * (late.cache - early.cache)
    assert early.tensors < dense.tensors


def test_live_bytes_sees_tensors_come_and_go() -> None:
    before = torch.zeros(1000)
    with LiveBytes(before) as seen:
        kept = torch.zeros(100)
        assert seen.live == 400
        view = kept[:50] + before[:50]
        assert seen.live == 600
        del kept
        assert seen.live == 200 and seen.peak == 600
        view.add_(1)
        assert seen.live == 200
