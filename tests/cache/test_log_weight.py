"""Entries that stand for several tokens: with +log(count) on their logits, merged twins weigh as they did apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import greedy, llama, tokens
from torch import Tensor

import saccade
from saccade.cache import PackedSegment
from saccade.core import CachePolicy, Info, LayerContext, StoredKV
from saccade.methods.cache.ems import EMS
from saccade.methods.cache.kvmerger import KVMerger
from saccade.parts.merging import COUNT, LOG_WEIGHT, average, fold, merge_entries

N = 60


@dataclass(frozen=True, kw_only=True)
class Pairs(CachePolicy):
    """Folds entry 2i + 1 into 2i, in all heads or in the first only."""

    weigh: bool
    heads: int = 2
    info = Info(slug="pairs", phase="cache", ragged=True)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        slots = torch.arange(kv.length).expand(*kv.keys.shape[:2], -1)
        into = torch.where(torch.arange(kv.heads)[:, None] < self.heads, slots - slots % 2, slots)
        weights = average(into, torch.ones(into.shape, dtype=kv.keys.dtype))
        merge_entries(kv, into, fold(kv.keys, into, weights), fold(kv.values, into, weights), weigh=self.weigh)


def twins(n: int = N, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Keys that are equal in pairs, with values of their own, and what comes after n of them."""
    q, k, v = random_qkv(n + 40, batch=batch)
    k[:, :, 1:n:2] = k[:, :, 0:n:2]
    return q, k, v


def run(policy: CachePolicy | None, real: Tensor | None = None, softcap: float | None = None) -> tuple[Tensor, Single]:
    """The outputs of what follows the prompt: single tokens, a few guesses of which some are taken back, and a longer turn."""
    q, k, v = twins()
    single = Single(policy)
    if softcap is not None:
        plain = single.runner.run
        single.runner.run = lambda call, layer: plain(replace(call, softcap=softcap), layer)
    single.feed(q[:, :, :N], k[:, :, :N], v[:, :, :N], real)
    if policy is not None:
        single.end_prompt()

    def part(begin: int, end: int) -> Tensor:
        return single.feed(*(x[:, :, begin:end] for x in (q, k, v)))

    outs = [part(N, N + 1), part(N + 1, N + 2), part(N + 2, N + 7)]
    single.layer.crop(-3)
    outs += [part(N + 4, N + 5), part(N + 5, N + 30)]
    return torch.cat(outs, 2), single


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_merged_twins_weigh_as_they_did_apart(heads: int, padded: bool, softcap: float | None) -> None:
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, :8] = not padded
    given = real if padded else None
    apart, _ = run(None, given, softcap)
    merged, single = run(Pairs(weigh=True, heads=heads), given, softcap)
    assert float((merged - apart).abs().max()) < 1e-12
    packed = [s for s in single.layer.segments if isinstance(s, PackedSegment)]
    assert bool(packed) == (padded or heads == 1)
    held = single.layer.lengths()
    assert held[0] == [N // 2 + 30, (N // 2 if heads == 2 else N) + 30] and held[1][0] == N // 2 + 30 - 4 * padded
    light, _ = run(Pairs(weigh=False, heads=heads), given, softcap)
    assert float((light - apart).abs().max()) > 1e-2, "without the weight a pair counts once"


def test_weights_are_log_counts_and_follow_their_entries() -> None:
    """A second merge adds counts up; rows, copies and new entries keep their own."""
    q, k, v = twins()
    single = Single(Pairs(weigh=True))
    single.feed(q[:, :, :N], k[:, :, :N], v[:, :, :N])
    single.end_prompt()
    single.feed(*(x[:, :, N : N + 2] for x in (q, k, v)))
    side = single.layer.open().side
    assert side[COUNT][0, 0].tolist() == [2] * 30 + [0] * 2
    assert torch.equal(side[LOG_WEIGHT][0, 0], torch.tensor([2.0] * 30 + [1.0] * 2, dtype=torch.float64).log())
    single.layer.reorder_cache(torch.tensor([1, 1, 0]))
    single.end_prompt()
    side = single.layer.open().side
    assert side[COUNT][2, 1].tolist() == [4] * 15 + [2]
    assert torch.equal(side[LOG_WEIGHT], side[COUNT].double().log())


def later(policy: CachePolicy | None, q: Tensor, k: Tensor, v: Tensor, n: int) -> tuple[Tensor, list[list[int]]]:
    single = Single(policy)
    single.feed(*(x[:, :, :n] for x in (q, k, v)))
    if policy is not None:
        single.end_prompt()
    return single.steps(*(x[:, :, n:] for x in (q, k, v))), single.layer.lengths()


@pytest.mark.parametrize("weigh", [False, True])
def test_kvmerger_may_weigh_its_sets(weigh: bool) -> None:
    q, k, v = twins()
    policy = KVMerger(threshold=0.999, heavy=0.0, recent=0.0, skip_layers=(), weigh_counts=weigh)
    merged, held = later(policy, q, k, v, N)
    apart, _ = later(None, q, k, v, N)
    assert held == [[N // 2 + 40] * 2] * 2
    assert (float((merged - apart).abs().max()) < 1e-12) == weigh


@pytest.mark.parametrize("weigh", [False, True])
def test_ems_may_weigh_its_classes(weigh: bool) -> None:
    """Tokens that come three times; with queries of 0 the first copies are the centres, and the last are merged into them."""
    q, k, v = random_qkv(35)
    q[:, :, :30] = 0
    k[:, :, 10:30], v[:, :, 10:30] = (x[:, :, :10].repeat(1, 1, 2, 1) for x in (k, v))

    def held_and_output(policy: CachePolicy | None) -> tuple[int, Tensor]:
        single = Single(policy)
        single.feed(*(x[:, :, :30] for x in (q, k, v)))
        if policy is not None:
            single.end_prompt()
        return single.layer.lengths()[0][0], single.feed(*(x[:, :, 30:31] for x in (q, k, v)))

    held, merged = held_and_output(EMS(budget=20, window=1, threshold=0.99, weigh_counts=weigh))
    _, apart = held_and_output(None)
    assert held == 20
    assert (float((merged - apart).abs().max()) < 1e-6) == weigh


def test_what_reads_entries_one_by_one_is_refused() -> None:
    ems = "ems(budget=20, window=4, threshold=-1, weigh_counts=True)"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"decode": "quest(page_size=4, dense_layers=0)", "cache": ems}, "quest reads"),
        ({"cache": f"{ems}|zipcache(interval=8)"}, "can't be encoded with their weights"),
    ]
    for given, why in cases:
        with pytest.raises(ValueError, match=why), saccade.attach(llama(), **given):
            greedy(llama(), tokens(1, 50), 4)


def test_fields_are_checked() -> None:
    for policy in (EMS, KVMerger):
        with pytest.raises(ValueError, match=r"weigh_counts=1\) is neither True nor False"):
            policy(weigh_counts=1)
