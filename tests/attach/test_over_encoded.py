"""Decode methods over entries that a cache policy has sealed: where nothing was lost by sealing, nothing changes at all."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import Session
from saccade.cache import KVLayer
from saccade.cache.parted import PartedSegment
from saccade.cache.stores import PlainStore, Store
from saccade.core import CachePolicy, Info, LayerContext, StoredKV
from tests.contract.harness import METHODS, greedy, info, llama, plan, sparse, tokens

TYPICAL = {"quest", "tidaldecode"}
READERS = [
    pytest.param(slug, marks=[] if slug in TYPICAL else pytest.mark.slow) for slug in sorted(METHODS) if info(slug).reads_encoded
]


def _plain(k: Tensor, v: Tensor) -> tuple[Store, Store]:
    return PlainStore(k), PlainStore(v)


@dataclass(frozen=True, kw_only=True)
class Sealing(CachePolicy):
    """Seals entries as they are, in two parts, so that they do not lie in the order of their slots; again every `interval` tokens."""

    interval: int = 6
    info = Info(slug="test-sealing", phase="cache", encodes=True, append_only=False)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if n := kv.length:
            classes = (torch.arange(n) % 3 == 0).long().expand(len(kv.keys), n)
            kv.seal(PartedSegment.by_class(kv.keys, kv.values, kv.side, classes, [_plain, _plain]), n)


def attached(slug: str, cache: CachePolicy | None) -> Session:
    spec = sparse(slug)
    return saccade.attach(llama(), decode=spec, cache=cache, plan=plan("llama", spec, torch.float64))


def first(cache: DynamicCache) -> KVLayer:
    layer = cache.layers[0]
    assert isinstance(layer, KVLayer)
    return layer


@torch.no_grad()
def steps(cache: DynamicCache, fed: list[int]) -> Tensor:
    """Logits of single tokens after what the cache holds."""
    rows = len(first(cache).lengths())
    return torch.cat([llama()(torch.full((rows, 1), token), past_key_values=cache).logits for token in fed], 1)


@pytest.mark.parametrize("slug", READERS)
def test_sealing_changes_nothing(slug: str, tmp_path: Path) -> None:
    """Padding, beams, guesses, a later turn, tokens taken back from a sealed part, a copy and a saved file."""
    ids = tokens(2, 60)
    padded = ids.clone()
    padded[0, :9] = 0
    made: list[list[Tensor]] = []
    for cache in (None, Sealing()):
        found = []
        with attached(slug, cache) as handle:
            found.append(greedy(llama(), padded, 15, attention_mask=(padded > 0).long()))
            found.append(greedy(llama(), ids, 8, num_beams=2))
            again = torch.cat([ids[:1, :30], ids[:1, :30]], 1)
            found.append(greedy(llama(), again, 14, prompt_lookup_num_tokens=4))
            own = DynamicCache(config=llama().config)
            with torch.no_grad():
                llama()(ids, past_key_values=own)
                found.append(steps(own, [5, 6, 7, 8, 9, 10, 11, 12, 13]))
                found.append(llama()(ids[:, :20], past_key_values=own).logits)
                found.append(steps(own, [5, 6, 7]))
                own.crop(-13)
                found.append(steps(own, [8, 9]))
            twin, path = copy.deepcopy(own), tmp_path / "own.cache"
            handle.save(path, own)
            found.append(steps(own, [10, 11, 12, 13, 14, 15, 16]))
            if cache is not None:
                assert len(first(own).segments) > 2, "decoding sealed more"
        for other in (twin, saccade.load_cache(path, llama())):
            with attached(slug, cache):
                found.append(steps(other, [10, 11, 12, 13, 14, 15, 16]))
        made.append(found)
    for number, (alone, sealed) in enumerate(zip(*made, strict=True)):
        if alone.is_floating_point():
            assert float((alone - sealed).abs().max()) < 1e-9, number
        else:
            assert torch.equal(alone, sealed), number


def test_rows_that_keep_differently_many_entries() -> None:
    """zipvl drops what matters to no probe, row by row; without padding each row is then run alone, as it would be in a batch of one."""
    ids, policy = tokens(2, 70, seed=4), "zipvl(rest='drop', tau=0.6, recent=4, drawn=8, interval=4)"
    with saccade.attach(llama(), cache=policy, decode="quest(page_size=4, budget=0.4, dense_layers=0)") as handle:
        cache = DynamicCache(config=llama().config)
        both = greedy(llama(), ids, 8, past_key_values=cache)
        lengths = first(cache).lengths()
        assert lengths[0] != lengths[1] and handle.stats().decode_density is not None
        alone = [greedy(llama(), row[None], 8)[0] for row in ids]
    assert torch.equal(both, torch.stack(alone))


def test_a_small_budget_decodes_few_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of quest over 1,200 tokens in 4 bits reads three pages of 16: once its index is there, no range is decoded."""
    ids, read, gathered = tokens(1, 1200), [], []
    real_read, real_gather = PartedSegment.read, PartedSegment.gather

    def spied_read(self: PartedSegment, begin: int, end: int) -> object:
        read.append(end - begin)
        return real_read(self, begin, end)

    def spied_gather(self: PartedSegment, slots: Tensor) -> object:
        gathered.append(slots.shape[2])
        return real_gather(self, slots)

    monkeypatch.setattr(PartedSegment, "read", spied_read)
    monkeypatch.setattr(PartedSegment, "gather", spied_gather)
    cache = DynamicCache(config=llama().config)
    reader = "quest(budget=48, dense_layers=0, reduce='group_max')"
    with saccade.attach(llama(), cache="zipcache", decode=reader) as handle, torch.no_grad():
        llama()(ids, past_key_values=cache)
        steps(cache, [5])
        assert sum(read) == 1200 * len(cache.layers), "every key is seen once, by the index"
        read.clear()
        gathered.clear()
        handle.reset()
        steps(cache, [6])
        stats = handle.stats()
    assert read == [] and len(gathered) == len(cache.layers) and max(gathered) <= 48
    assert stats.decode_density == pytest.approx(48 / 1202) and sum(s.length for s in first(cache).segments) == 1200


def test_what_can_not_read_codes_is_refused() -> None:
    with pytest.raises(ValueError, match="magicpig reads keys in full precision and zipcache encodes them: use one of the two"):
        saccade.attach(llama(), cache="zipcache", decode="magicpig")
    cache = DynamicCache(config=llama().config)
    with saccade.attach(llama(), cache="zipcache"), torch.no_grad():
        llama()(tokens(1, 40), past_key_values=cache)
        steps(cache, [5])
    with saccade.attach(llama(), decode=sparse("magicpig")), pytest.raises(ValueError, match="this cache holds encoded ones"):
        steps(cache, [6])
    with saccade.attach(llama(), decode=sparse("quest")) as handle:
        assert bool(steps(cache, [6]).isfinite().all()) and handle.stats().decode_density < 0.5
    moving = "tokenselect(budget=12, sinks=2, local=8, reindex=True)"
    with saccade.attach(llama(), cache="zipcache", decode=moving), pytest.raises(ValueError, match="leave reindex off"):
        greedy(llama(), tokens(1, 60), 3)
