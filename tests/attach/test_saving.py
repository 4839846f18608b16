"""Caches on disk, in another process's place, under other methods, and shared between requests."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import saccade
from saccade.cache import KVLayer
from saccade.core.storage import pack, read, unpack, write
from tests.contract.models import tiny


def ids(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, n), generator=torch.Generator().manual_seed(seed))


def steps(model, cache, batch: int = 2, n: int = 5) -> Tensor:
    logits = [model(ids(batch, 1, 100 + i), past_key_values=cache, use_cache=True).logits for i in range(n)]
    return torch.cat(logits, 1)


METHODS = [
    {"cache": "snapkv(budget=20, window=4)"},
    {"cache": "h2o(budget=24)"},
    {"cache": "zipcache(interval=8)"},
    {"cache": "snapkv(budget=24, window=4)|zipcache(interval=8)"},
    {"cache": "streaming-llm(sinks=2, window=20)"},
    {"cache": "think(key_bits=4, recent=8)"},
    {"cache": "akvq-vl(recent=8, pivots=2)"},
    {"cache": "zipvl(tau=0.8, recent=4, drawn=8, interval=8)"},
    {"cache": "kvmerger"},
    {"decode": "magicpig(bits=3, tables=6, sinks=1, window=8, dense_every=0)"},
    {"decode": "tokenselect(sinks=2, local=8, budget=12, chunk=16)"},
    {"decode": "quest(page_size=4, budget=0.3, dense_layers=0)"},
]


@pytest.mark.parametrize("methods", METHODS, ids=str)
@pytest.mark.parametrize("closed", [False, True])
def test_a_run_goes_on_from_a_saved_cache(tmp_path: Path, methods: dict[str, str], closed: bool) -> None:
    """Saved after the prompt (which ends with the next single token), or in the middle of decoding: the same logits."""
    model, path = tiny("llama"), tmp_path / "prompt.cache"
    with saccade.attach(model, **methods) as handle, torch.no_grad():
        cache = model(ids(2, 60), use_cache=True).past_key_values
        if closed:
            steps(model, cache, n=2)
        handle.save(path)
        expected = steps(model, cache)
    with saccade.attach(model, **methods) as handle, torch.no_grad():
        cache = saccade.load_cache(path, model)
        assert torch.equal(steps(model, cache), expected)
        assert handle.stats().tokens_seen == 65 + 2 * closed


def test_padded_rows_and_beams_survive(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "prompt.cache"
    mask = torch.ones(2, 30, dtype=torch.int64)
    mask[1, :9] = 0
    with saccade.attach(model, cache="snapkv(budget=12, window=4)") as handle, torch.no_grad():
        cache = model(ids(2, 30), attention_mask=mask, use_cache=True).past_key_values
        handle.compress()
        handle.save(path)
        again = saccade.load_cache(path, model)
        for one in (cache, again):
            one.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(steps(model, again), steps(model, cache))


def test_layers_that_are_left_alone_are_saved_too(tmp_path: Path) -> None:
    model, path = tiny("gemma3"), tmp_path / "prompt.cache"
    with saccade.attach(model, cache="snapkv(budget=20, window=4)") as handle, torch.no_grad():
        cache = model(ids(1, 50), use_cache=True).past_key_values
        handle.save(path)
        assert torch.equal(steps(model, saccade.load_cache(path, model), 1), steps(model, cache, 1))


def test_other_methods_make_their_own_index(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "prompt.cache"
    quest = {"decode": "quest(page_size=4, budget=0.3, dense_layers=0)"}
    with saccade.attach(model, decode="quest(page_size=8, budget=0.5, dense_layers=0)") as handle, torch.no_grad():
        cache = model(ids(2, 60), use_cache=True).past_key_values
        steps(model, cache, n=1)
        handle.save(path)
    with saccade.attach(model, **quest), torch.no_grad():
        found = steps(model, saccade.load_cache(path, model))
    with saccade.attach(model, **quest), torch.no_grad():
        cache = model(ids(2, 60), use_cache=True).past_key_values
        model(ids(2, 1, 100), past_key_values=cache)  # densely read by the other method, but with the same keys in layer 0
        layer = cache.layers[0]
    with saccade.attach(model, **quest), torch.no_grad():
        loaded = saccade.load_cache(path, model)
        steps(model, loaded, n=1)
        pages = [one.layers[0].states.get("decode", None)["pages"] for one in (loaded, cache)]
    assert found.isfinite().all() and isinstance(layer, KVLayer)
    assert pages[0].page_size == pages[1].page_size == 4


def test_requests_share_a_prefix_and_its_sealed_segments() -> None:
    model = tiny("llama")
    with saccade.attach(model, cache="zipcache(interval=64)") as handle, torch.no_grad():
        prefix = model(ids(1, 60), use_cache=True).past_key_values
        handle.compress()
        requests = [copy.deepcopy(prefix) for _ in range(2)]
        assert all(a.segments[0] is b.segments[0] for a, b in zip(prefix.layers, requests[1].layers, strict=True))
        first = steps(model, requests[0], 1)
        assert torch.equal(steps(model, requests[1], 1), first) and prefix.get_seq_length() == 60


def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "prompt.cache"
    with saccade.attach(model, cache="snapkv(budget=20, window=4)") as handle, torch.no_grad():
        with pytest.raises(ValueError, match="there is no cache to save"):
            handle.save(path)
        cache = model(ids(1, 40), use_cache=True).past_key_values
        handle.save(path)
        with pytest.raises(ValueError, match="does not exist"):
            handle.save(tmp_path / "none" / "x")
    assert cache is not None and [p.name for p in tmp_path.iterdir()] == ["prompt.cache"]
    with pytest.raises(ValueError, match=r"another model \(LlamaForCausalLM\)"):
        saccade.load_cache(path, tiny("qwen3"))
    with pytest.raises(ValueError, match="there is no file"):
        saccade.load_cache(tmp_path / "nothing", model)
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b"not a cache at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            saccade.load_cache(path, model)
    write(path, "saccade.other/1", {}, [1])
    with pytest.raises(ValueError, match="not a file of kind"):
        saccade.load_cache(path, model)


def test_trees_hold_plain_values_and_our_own_objects_only(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    value = {"a": [1, 2.5, None, True, float("inf")], 3: (torch.bfloat16, {"x"}), "t": shared, "same": shared, "empty": torch.zeros(0, 2)}
    tensors: dict[str, Tensor] = {}
    found = unpack(pack(value, tensors), tensors)
    assert len(tensors) == 2 and found["a"] == value["a"] and found[3] == value[3] and found["same"] is found["t"]
    write(tmp_path / "x", "test/1", {"n": 1}, value)
    facts, again = read(tmp_path / "x", "test/1")
    assert facts == {"n": 1} and torch.equal(again["t"], shared) and again["empty"].shape == (0, 2)
    with pytest.raises(ValueError, match=r"a pathlib\.\w+ can't be saved"):
        pack(Path("."), {})
    for foreign in ("os:system", "saccade.core.storage:pack", "saccade.core.files:os"):
        with pytest.raises(ValueError, match="none of saccade's classes"):
            unpack({"class": foreign, "fields": {}}, {})
    with pytest.raises(ValueError, match="unexpected 'eval'"):
        unpack({"eval": "1"}, {})
