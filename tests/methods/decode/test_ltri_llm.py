"""ltri-llm: spans of the local map, their vectors, votes and persistence, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.decode.harness import needle
from tests.methods.decode.sealing import ROTARY, on_host, step_context, told
from tests.methods.decode.stack import worst
from tests.methods.decode.test_infllm import clamped, run, stream_of
from torch import Tensor

import saccade
from saccade.cache.stream import Stream
from saccade.methods.decode.ltri_llm import LtriLLM
from saccade.parts.rotary import turn
from saccade.parts.spans import span_starts, triangle_scores

SMALL: dict[str, Any] = {"n_local": 24, "n_init": 5, "chunk": 10, "stretch": 12, "longest": 6, "vectors": 2, "budget": 18}


def blocks_map(size: int, count: int) -> Tensor:
    """A causal map of equal blocks in which every row looks evenly at its block's tokens so far."""
    block = torch.ones(size, size, dtype=torch.float64).tril()
    return torch.block_diag(*[block / block.sum(-1, keepdim=True)] * count)


# -- spans -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("iou", [0.3, 0.5])
def test_planted_blocks_are_returned_exactly(size: int, share: float, iou: float) -> None:
    """For theta between 1 / (n + 1) and 1 / n (at the ends two cuts score alike); a smaller one glues blocks, a larger one cuts them."""
    attention, n = blocks_map(size, 5), 5 * size
    theta = (1 - share) / (size + 1) + share / size
    starts = span_starts(triangle_scores(attention, theta, n), iou).nonzero().flatten()
    assert starts.tolist() == list(range(0, n, size))
    glued = span_starts(triangle_scores(attention, 0.3 / size, n), iou)
    cut = span_starts(triangle_scores(attention, 3 / size, n), iou)
    assert int(glued.sum()) < 5 < int(cut.sum())


def test_a_span_stands_for_the_keys_that_receive_attention_in_it() -> None:
    attention = blocks_map(6, 2)
    attention[3:6, :3] = torch.tensor([0.1, 0.7, 0.05])
    method = LtriLLM(**{**SMALL, "theta": 1 / 6.5})
    starts, ends, counts, tokens = method.cut(attention)
    assert starts.tolist() == [0, 6] and ends.tolist() == [6, 12] and counts.tolist() == [2, 2]
    assert tokens[0].tolist() == [1, 0] and tokens[1].tolist() == [6, 7]
    dim = torch.full((12, 12), 1 / 12, dtype=torch.float64).tril()
    dim[:6, :6] = attention[6:, 6:]  # the second span is less of a triangle than the first
    sure = replace(method, index="dynamic", vectors=4, theta=0.05)
    _, _, counts, tokens = sure.cut(dim)
    assert counts[0] == 2 or counts[0] < counts[1]
    assert int(counts.max()) <= 4 and tokens.shape[1] == 4


def filled(method: LtriLLM, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Any, Stream, Tensor]:
    """Context, memory and stream before the last token, and its query turned to the window's end."""
    n = k.shape[2] - 1
    turned_k, turned_q = (turn(x, torch.arange(n + 1), ROTARY) for x in (k, q))
    ctx = step_context(turned_q[:, :, -1:], turned_k, v)
    memory, stream = method.fresh(), Stream([], turned_k, v, ROTARY)
    for begin in range(0, n, method.chunk):
        method.take_in(ctx, memory, stream, turned_q[:, :, begin : min(begin + method.chunk, n)], begin)
    return ctx, memory, stream, turn(q[:, :, -1:], method.n_local, ROTARY)


def test_stretches_are_cut_by_their_own_attention_and_spans_tile_them() -> None:
    q, k, v = stream_of(6, 2, 101, batch=2)
    method = LtriLLM(**SMALL)
    _, memory, _, _ = filled(method, q, k, v)
    assert len(memory.ends) == 7
    table = memory.table.view[:, 0]
    for b in range(2):
        spans = [row for row in table[b].tolist() if row[1] > row[0]]
        assert spans[0][0] == 5 and spans[-1][1] == 89
        assert all(a[1] == c[0] for a, c in pairwise(spans)) and max(e - s for s, e, _ in spans) <= 6
    turned_q, turned_k = (turn(x, torch.arange(101), ROTARY) for x in (q, k))
    # the window of the stretch's last token begins at 5
    logits = turned_q[:, :, 17:29] @ turned_k[:, :, 5:29].repeat_interleave(3, 1).mT * 32**-0.5
    attention = logits.masked_fill(torch.ones(12, 24).triu(13).bool(), -torch.inf).softmax(-1).mean(1)[0, :, 12:]
    starts, _, _, tokens = method.cut(attention)
    second = [row[0] for row in table[0, memory.ends[0] : memory.ends[1]].tolist() if row[1] > row[0]]
    assert second == (starts + 17).tolist()
    assert worst(memory.vectors.view[0, :, memory.ends[0], 0], k[0, :, 17 + tokens[0, 0]]) < 1e-10


# -- retrieval -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[150], [61, *[1] * 89]], ids=["prompt", "steps"])
def test_a_budget_for_all_spans_equals_attention_with_distances_cut_off(pieces: list[int]) -> None:
    q, k, v = stream_of(6, 2, 150, batch=2)
    out, _ = run(LtriLLM(**{**SMALL, "budget": 999}), q, k, v, pieces)
    assert worst(out, clamped(q, k, v, 24)) < 1e-9


def test_rows_of_a_batch_read_spans_of_their_own() -> None:
    q, k, v = stream_of(6, 2, 140, batch=3)
    method = LtriLLM(**SMALL)
    together, layer = run(method, q, k, v, [100, *[1] * 40])
    alone = torch.cat([run(method, q[b : b + 1], k[b : b + 1], v[b : b + 1], [100, *[1] * 40])[0] for b in range(3)])
    assert worst(together, alone) < 1e-9
    assert layer.tail is not None and layer.tail.n <= 24 + 5 + 4 * 12


def test_votes_follow_the_heads_and_retrieval_heads_weigh_more() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = LtriLLM(**SMALL)
    ctx, memory, _, far = filled(method, q, k, v)
    spans = memory.ends[method.units(100) - 1]
    votes = method.votes(ctx, memory, far, spans)
    assert float((votes.sum(-1) - 1).abs().max()) < 1e-12
    table = memory.table.view[0, 0, :spans]
    each = (memory.vectors.view[0, :, :spans].repeat_interleave(3, 0) @ far[0, :, 0, None, :, None]).squeeze(-1) * 32**-0.5
    shares = each.masked_fill(torch.arange(2) >= table[:, 2:], -torch.inf).amax(-1).softmax(-1)
    assert worst(votes[0], shares.mean(0)) < 1e-12
    known = replace(method, retrieval_heads=((2, 4), (3, 0)), boost=10.0)
    assert worst(known.votes(ctx, memory, far, spans)[0], (shares.sum(0) + 9 * shares[4]) / 15) < 1e-12


def test_a_span_that_a_lower_layer_votes_for_is_shared_with_the_next() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = LtriLLM(**{**SMALL, "budget": 6})
    ctx, memory, _, far = filled(method, q, k, v)
    count = method.units(100) * 12
    plain = method.choose(ctx, memory, far, 100)
    span = next(row for row in memory.table.view[0, 0].tolist() if not bool(plain[0, row[0] - 5]))
    ctx.shared.clear()
    loud = torch.zeros(1, count, dtype=torch.float64)
    loud[:, span[0] - 5 : span[1] - 5] = 4.0
    ctx.shared["ltri-llm 100"] = loud
    shared = method.choose(ctx, memory, far, 100)
    assert bool(shared[0, span[0] - 5 : span[1] - 5].all())
    assert float(ctx.shared["ltri-llm 100"][0, span[0] - 5]) > 2.0, "half of it goes on to the layers above"
    ctx.shared.clear()
    assert torch.equal(method.choose(ctx, memory, far, 100), plain)


def test_a_retrieved_span_persists_for_some_steps_and_is_forgotten_when_tokens_are_taken_back() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = LtriLLM(**{**SMALL, "budget": 6, "persist": 3, "decay": 1.0})
    ctx, memory, _, far = filled(method, q, k, v)
    flat = torch.zeros_like(far)

    def chosen(query: Tensor, place: int) -> list[int]:
        ctx.shared.clear()
        return method.choose(ctx, memory, query, place)[0].nonzero().flatten().tolist()

    blank = chosen(flat, 90)
    memory.history.clear()
    asked = chosen(20 * far, 90)
    assert asked != blank
    assert [chosen(flat, place) == asked for place in (91, 92, 93)] == [True, True, True]
    assert chosen(flat, 94) == asked or len(memory.history) == 5
    memory.history = memory.history[:1]
    assert [chosen(flat, p) for p in (91, 92)] == [asked, asked]
    assert chosen(flat, 90) == blank, "what came after a place that is read again is forgotten"


def test_spans_beat_fixed_blocks_where_needles_lie_across_their_borders() -> None:
    """Needles of 6 tokens that attend to each other, across the borders of 6-token blocks; as many tokens are read."""
    g = torch.Generator().manual_seed(0)
    length, heads = 12 * 8 + 5 + 24, 2
    q, k, v = stream_of(heads, heads, length, seed=7)
    places = [5 + 12 * i + 3 for i in range(8)]  # each ends 3 tokens before its stretch does
    marks = torch.randn(8, 32, generator=g, dtype=torch.float64)
    marks[:, torch.cat([torch.arange(10), torch.arange(16, 26)])] = 0.0  # channels that hardly turn
    for place, mark in zip(places, marks, strict=True):
        q[:, :, place : place + 6] = k[:, :, place : place + 6] = 5 * mark + 0.05 * torch.randn(6, 32, generator=g, dtype=torch.float64)
    found = {"spans": 0, "blocks": 0}
    cut = LtriLLM(**{**SMALL, "budget": 6, "persist": 0, "layer_share": 0.0})
    for place, mark in zip(places, marks, strict=True):
        q[:, :, -1] = 5 * mark
        ctx, memory, _, far = filled(cut, q, k, v)
        if cut.units(length - 1) * 12 + 5 < place + 6:
            continue
        chosen = cut.choose(ctx, memory, far, length - 1)[0]
        assert int(chosen.sum()) <= 6
        found["spans"] += int(chosen[place - 5 : place + 1].sum())
        fixed = k[0, :, 5 : 5 + chosen.shape[0]].unflatten(1, (-1, 6))
        block = int((fixed @ far[0, :, 0, :, None].unsqueeze(1)).squeeze(-1).amax(-1).sum(0).argmax())
        found["blocks"] += len(set(range(place - 5, place + 1)) & set(range(6 * block, 6 * block + 6)))
    assert found["spans"] > 1.5 * found["blocks"] > 0, found


@pytest.mark.slow
def test_needle_is_found_through_a_quarter_of_the_context() -> None:
    prompt = needle(1024)
    spec = "ltri-llm(n_local=96, n_init=8, chunk=64, stretch=64, longest=32, budget=120)"
    text, stats, cache = told(prompt, prefill=spec)
    assert text == prompt.answer
    held = 8 * 2 * 2 * 64 * 4 * prompt.ids.shape[1]
    assert stats.kv_bytes < 0.2 * held and on_host(cache) > 0.8 * held
    assert stats.decode_density is not None and stats.decode_density < 0.25


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(0))
    spec = "ltri-llm(n_local=16, n_init=2, chunk=8, stretch=8, longest=6, vectors=2, budget=12)"
    with saccade.attach(model, prefill=spec) as handle, torch.no_grad():
        cache = model(ids[:, :70], use_cache=True).past_key_values
        model(ids[:, 70:71], past_key_values=cache)
        handle.save(tmp_path / "a.cache")
        want = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(71, 90)]
        again = saccade.load_cache(tmp_path / "a.cache", model)
        for i in range(71, 90):
            assert torch.equal(model(ids[:, i : i + 1], past_key_values=again).logits, want[i - 71])


@pytest.mark.parametrize("fields", ["iou=2", "longest=600", "index='none'", "theta=-1", "persist=-1", "budget=10"])
def test_fields_out_of_range_are_refused(fields: str) -> None:
    with pytest.raises(ValueError, match="ltri-llm"):
        saccade.methods.build(f"ltri-llm({fields})")
