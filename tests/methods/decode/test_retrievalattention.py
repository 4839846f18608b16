"""retrievalattention: the graph of queries, search, exact merging, and what stays on the device."""

from __future__ import annotations

import builtins
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.decode.harness import logits, needle, recall, tensors
from tests.methods.decode.sealing import on_host, step_context, told
from tests.methods.decode.stack import dense, over, worst
from torch import Tensor

import saccade
from saccade.cache import Rectangle, Slots
from saccade.methods.decode.retrievalattention import RetrievalAttention, RetrievalSegment
from saccade.parts.ann import KeyGraph, key_graph, search, stack_graphs


def closed(method: RetrievalAttention, q: Tensor, k: Tensor, v: Tensor, prompt: Tensor | None = None, pairs: list[float] | None = None):
    """The context of a step after a closed prompt whose queries were `prompt (B, Hq, n, D)`."""
    n = k.shape[2]
    slots = Slots(Rectangle(k, v, {"positions": torch.arange(n, dtype=torch.int32).expand(*k.shape[:3])}))
    ctx = step_context(q, k, v, pairs, rotary=None)
    ctx.phase = "cache"
    method.watch(ctx, slots, q.expand(-1, -1, n, -1) if prompt is None else prompt)
    method.compress(ctx, slots)
    ctx.phase, ctx.segments = "decode", slots.sealed
    return ctx, slots


def prompt_queries(q: Tensor, n: int, seed: int = 5) -> Tensor:
    return torch.randn(*q.shape[:2], n, q.shape[3], generator=torch.Generator().manual_seed(seed), dtype=q.dtype)


# -- the graph -------------------------------------------------------------------------------------------------------------


@cache
def foreign(n: int, queries: int = 1500, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Keys around a cone; queries from another distribution, far from them, in 40 bundles; and 40 later ones of the same kind."""
    g = torch.Generator().manual_seed(0)
    keys = torch.randn(n, dim, generator=g) + 2 * torch.randn(dim, generator=g)
    mixing = torch.randn(dim, dim, generator=g) * (torch.arange(1, dim + 1) ** -0.7)
    bundles = 3 * torch.randn(40, dim, generator=g)
    draw = [bundles[torch.arange(m) % 40] + torch.randn(m, dim, generator=g) for m in (queries, 40)]
    return keys, draw[0] @ mixing.mT - 3, draw[1] @ mixing.mT - 3


def curve(graph: KeyGraph, keys: Tensor, queries: Tensor, beam: int) -> tuple[float, float]:
    """Recall of the best 100 keys and the share of keys scanned, the mean over queries."""
    found = search(queries[None], keys[None, None], stack_graphs([graph], (1, 1)), best=100, beam=beam)
    scores = queries @ keys.mT
    true = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(100).indices, True)
    mask = torch.zeros_like(true).scatter(1, found.ids[0], True)
    return recall(mask, true), float(found.scanned.double().mean()) / keys.shape[0]


def inverted_lists(keys: Tensor, queries: Tensor, probes: int) -> tuple[float, float]:
    """The same for k-means lists of keys, of which each query scans the `probes` with the best centroids."""
    from saccade.parts.clusters import kmeans

    cells = kmeans(keys[None], 64, generator=torch.Generator().manual_seed(0), iterations=10)
    best = (queries @ cells.centroids[0].mT).topk(probes).indices
    scanned = (cells.labels[0][None, :, None] == best.unsqueeze(1)).any(-1)
    scores = queries @ keys.mT
    true = torch.zeros_like(scanned).scatter(1, scores.topk(100).indices, True)
    return recall(scanned, true), float((scanned.sum(-1) + 64).double().mean()) / keys.shape[0]


@pytest.mark.slow
def test_the_graph_of_queries_finds_more_with_fewer_keys_scanned() -> None:
    keys, past, later = foreign(4000)
    ours, own = key_graph(keys, past, degree=32, links=64), key_graph(keys, past[:0], degree=64, links=64)
    found, scanned = curve(ours, keys, later, 100)
    assert found > 0.88 and scanned < 0.3, (found, scanned)
    # a graph of near keys, and lists of keys: as many scanned find less, and to find as much takes more
    others = [curve(own, keys, later, beam) for beam in (100, 200)] + [inverted_lists(keys, later, probes) for probes in (6, 12, 24)]
    assert all(r < found - 0.04 or s > 1.3 * scanned for r, s in others), ((found, scanned), others)


def test_scanned_keys_grow_slower_than_the_cache() -> None:
    counts = []
    for n in (1000, 4000):
        keys, past, later = foreign(n)
        found, share = curve(key_graph(keys, past, degree=24, links=32), keys, later, 100)
        assert found > 0.85
        counts.append(share * n)
    assert counts[1] < 2.2 * counts[0], counts


def test_every_key_can_be_reached() -> None:
    g = torch.Generator().manual_seed(0)
    islands = torch.cat([torch.randn(60, 8, generator=g) + 100 * i for i in range(4)])
    graph = key_graph(islands, islands[:50], degree=8, links=8)
    found = search(islands[:1][None], islands[None, None], stack_graphs([graph], (1, 1)), best=240, beam=240)
    assert torch.equal(found.ids[0, 0], torch.arange(240)) and int(found.scanned) == 240


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_graphs_of_few_keys(n: int) -> None:
    keys = torch.randn(n, 8, generator=torch.Generator().manual_seed(n))
    graph = stack_graphs([key_graph(keys, keys * 2, degree=4, links=4)], (1, 1))
    found = search(torch.ones(1, 1, 8), keys[None, None], graph, best=1, beam=4)
    assert int(found.ids) == int(keys.sum(-1).argmax()) and int(found.scanned) == n


# -- the method ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["roar", "flat"])
def test_all_keys_retrieved_equal_dense(index: Any) -> None:
    q, k, v = tensors(2, 6, 2, 300, 16)
    for top_k in (1 << 20, 253):  # read in one go, and found by the search: 1 of 254 is left out
        ctx, slots = closed(RetrievalAttention(sinks=6, window=40, top_k=top_k, index=index), q, k, v, prompt_queries(q, 300))
        out = RetrievalAttention(sinks=6, window=40, top_k=top_k, index=index).attend(ctx, q, slots.keys, slots.values)
        error = worst(out, dense((q, k, v)))
        assert error < 1e-12 if top_k > 254 else 0 < error < 0.05


@pytest.mark.parametrize("index", ["roar", "flat", "faiss-hnsw"])
def test_the_output_is_attention_over_what_was_found_and_the_static_set(index: Any) -> None:
    if index == "faiss-hnsw":
        pytest.importorskip("faiss")
    q, k, v = tensors(2, 6, 2, 300, 16)
    method = RetrievalAttention(sinks=6, window=40, top_k=20, beam=32, index=index, degree=12)
    pairs: list[float] = []
    ctx, slots = closed(method, q, k, v, prompt_queries(q, 300), pairs)
    (segment,) = slots.sealed
    assert isinstance(segment, RetrievalSegment) and segment.length == 260 and slots.length == 40
    found = segment.find(q.squeeze(2), index, 20, 32)
    mask = torch.zeros(2, 6, 300, dtype=torch.bool).scatter(-1, found.ids + 6, True)
    mask[..., :6] = mask[..., 260:] = True
    assert worst(method.attend(ctx, q, slots.keys, slots.values), over((q, k, v), mask)) < 1e-12
    scanned = float(found.scanned.clamp(min=0).double().mean())
    assert sum(pairs) == pytest.approx(66 + scanned / 2)
    true = torch.zeros(2, 6, 254, dtype=torch.bool).scatter(-1, logits(q, k)[..., 6:260].topk(20).indices, True)
    assert recall(torch.zeros_like(true).scatter(-1, found.ids, True), true) > (0.999 if index == "flat" else 0.6)


def test_queries_of_a_group_search_one_index_each_for_itself() -> None:
    q, k, v = tensors(1, 4, 2, 400, 16)
    method = RetrievalAttention(sinks=0, window=20, top_k=10)
    _, slots = closed(method, q, k, v, prompt_queries(q, 400))
    (segment,) = slots.sealed
    assert isinstance(segment, RetrievalSegment) and segment.graph is not None
    assert segment.graph.neighbours.shape[:3] == (1, 2, 380)
    ids = segment.find(q.squeeze(2), "roar", 10, 64).ids
    assert not torch.equal(ids[:, 0], ids[:, 1])


def test_the_stride_keeps_the_same_queries_however_a_prompt_is_cut() -> None:
    q, k, v = tensors(1, 4, 2, 100, 8)
    rows = prompt_queries(q, 100)
    method, kept = RetrievalAttention(query_stride=3), []
    for cuts in ([100], [31, 14, 1, 54], [31, 30, 69]):
        ctx, end = step_context(q, k, v, rotary=None), 0
        ctx.phase = "cache"
        for m in cuts:
            # the last way takes 30 tokens back: they come again
            begin = end if sum(cuts) == 100 else min(end, 31)
            end = begin + m
            ctx.seen = end
            method.watch(ctx, None, rows[:, :, begin:end])
        kept.append(ctx.state["queries"])
    assert kept[0].shape[2] == 34 and torch.equal(kept[0], rows[:, :, ::3])
    assert torch.equal(kept[2], kept[0])
    assert kept[1].shape[2] == 34 - (45 % 3 == 0)  # a single token ends a prompt: its query is not kept


@pytest.mark.slow
def test_needle_is_found_and_the_device_holds_little() -> None:
    prompt = needle()
    text, stats, cache = told(prompt, decode="retrievalattention(sinks=16, window=96, top_k=48, query_stride=8, links=16, degree=12)")
    assert text == prompt.answer
    n = prompt.ids.shape[1] + len(prompt.answer) - 1
    held = 8 * 2 * 2 * 64 * 4 * n
    assert stats.kv_bytes < 0.15 * held and on_host(cache) > 0.9 * held
    assert stats.decode_density is not None and stats.decode_density < 0.5


def test_a_saved_cache_and_one_cut_back_go_on(tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(0))
    spec = "retrievalattention(sinks=2, window=8, top_k=8)"
    with saccade.attach(model, decode=spec) as handle, torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        model(ids[:, 60:61], past_key_values=cache)
        handle.save(tmp_path / "a.cache")
        want = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(61, 70)]
        again = saccade.load_cache(tmp_path / "a.cache", model)
        for i in range(61, 70):
            assert torch.equal(model(ids[:, i : i + 1], past_key_values=again).logits, want[i - 61])
        again.crop(-30)  # into the offloaded prompt, which is then read in full
        got = model(ids[:, 40:41], past_key_values=again).logits
    with torch.no_grad():
        assert worst(got[:, 0], model(ids[:, :41]).logits[:, 40]) < 1e-4


def test_faiss_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def gone(name: str, *args: Any) -> Any:
        if name == "faiss":
            raise ImportError
        return real(name, *args)

    q, k, v = tensors(1, 2, 2, 100, 8)
    method = RetrievalAttention(sinks=2, window=10, top_k=5, index="faiss-hnsw")
    ctx, slots = closed(method, q, k, v)
    monkeypatch.setattr(builtins, "__import__", gone)
    with pytest.raises(ValueError, match=r"saccade\[ann\]"):
        method.attend(ctx, q, slots.keys, slots.values)


@pytest.mark.parametrize("fields", ["top_k=0", "index='ivf'", "sinks=-1", "links=1", "query_stride=0"])
def test_fields_out_of_range_are_refused(fields: str) -> None:
    with pytest.raises(ValueError, match="retrievalattention"):
        saccade.methods.build(f"retrievalattention({fields})")
