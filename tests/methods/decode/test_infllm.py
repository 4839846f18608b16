"""infllm: window, blocks, the fixed distance, representatives, and what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.decode.harness import needle, tensors
from tests.methods.decode.sealing import ROTARY, on_host, step_context, told
from tests.methods.decode.stack import worst
from torch import Tensor

import saccade
from saccade.attach.layers import LayerCall, LayerRunner
from saccade.cache import KVLayer
from saccade.cache.stream import Stream
from saccade.methods.decode.infllm import InfLLM
from saccade.parts.rotary import turn


def stream_of(heads: int, kv_heads: int, n: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """q `(batch, heads, n, 32)`, k, v before the rotary embedding."""
    q, k, v = (tensors(batch, h, h, n, 32, seed + i)[1] for i, h in enumerate((heads, kv_heads, kv_heads)))
    return q, k, v


def run(
    method: Any, q: Tensor, k: Tensor, v: Tensor, pieces: list[int], close: bool = True, rotary: Any = ROTARY
) -> tuple[Tensor, KVLayer]:
    """The outputs of a layer fed piece by piece, as an attached model feeds it, and its cache. Pieces of 1 are steps."""
    turned_q, turned_k = (x if rotary is None else turn(x, torch.arange(x.shape[2]), rotary) for x in (q, k))
    runner = LayerRunner(
        layer=2, layers=8, prefill=method, decode=method, policy=method, plans={}, when="call" if close else "prompt", impl="auto",
        seed=0, rotary=rotary,
    )  # fmt: skip
    layer, outs, begin = KVLayer(), [], 0
    for m in pieces:
        here = slice(begin, begin + m)
        keys, values = layer.update(turned_k[:, :, here], v[:, :, here])
        call = LayerCall(q=turned_q[:, :, here], k=keys, v=values, scale=32**-0.5, softcap=None, real=None, shared={})
        outs.append(runner.run(call, layer))
        begin += m
    return torch.cat(outs, 2), layer


def clamped(q: Tensor, k: Tensor, v: Tensor, n_local: int, readable: Tensor | None = None) -> Tensor:
    """Causal attention in which every distance is at most n_local; readable `(n, n)` bool restricts it."""
    n, group = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    places = torch.arange(n)
    near = turn(q, places, ROTARY) @ turn(k, places, ROTARY).mT
    far = turn(q, torch.full((n,), n_local), ROTARY) @ k.mT
    distance = places.unsqueeze(-1) - places
    logits = torch.where(distance < n_local, near, far) * 32**-0.5
    hidden = distance < 0 if readable is None else (distance < 0) | ~readable
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


SMALL: dict[str, Any] = {"n_local": 24, "n_init": 5, "chunk": 10, "block": 6, "representatives": 2, "blocks": 4, "cached": 6}


# -- the window and the distance -------------------------------------------------------------------------------------------


def test_inside_the_window_it_is_dense() -> None:
    q, k, v = stream_of(6, 2, 60)
    out, layer = run(InfLLM(**{**SMALL, "n_local": 60}), q, k, v, [60])
    assert worst(out, clamped(q, k, v, 60)) < 1e-10 and layer.plain


@pytest.mark.parametrize("pieces", [[150], [70, 50, 30], [61, *[1] * 89], [143, *[1] * 7]], ids=lambda pieces: f"{pieces[0]}-{len(pieces)}")
@pytest.mark.parametrize("close", [False, True])
def test_all_blocks_equal_attention_with_distances_cut_off_at_the_window(pieces: list[int], close: bool) -> None:
    q, k, v = stream_of(6, 2, 150, batch=2)
    out, layer = run(InfLLM(**{**SMALL, "blocks": 99, "cached": 99}), q, k, v, pieces, close)
    assert worst(out, clamped(q, k, v, 24)) < 1e-9
    assert layer.plain is (not close and 1 not in pieces)


def test_the_order_of_far_tokens_does_not_matter() -> None:
    q, k, v = stream_of(4, 2, 140)
    far = 100  # tokens that are far for the last queries
    order = torch.cat([torch.randperm(far, generator=torch.Generator().manual_seed(0)), torch.arange(far, 140)])
    method = InfLLM(**{**SMALL, "blocks": 99, "cached": 99})
    a, _ = run(method, q, k, v, [130, *[1] * 10])
    b, _ = run(method, q[:, :, order], k[:, :, order], v[:, :, order], [130, *[1] * 10])
    assert worst(a[:, :, 125:], b[:, :, 125:]) < 1e-9 < worst(a[:, :, 100:120], run(method, q, k, v.flip(2), [140])[0][:, :, 100:120])


def test_without_a_rotary_embedding_far_keys_stay_as_they_are() -> None:
    q, k, v = stream_of(4, 2, 120)
    out, _ = run(InfLLM(**{**SMALL, "blocks": 99, "cached": 99}), q, k, v, [110, *[1] * 10], rotary=None)
    logits = (q @ k.repeat_interleave(2, 1).mT) * 32**-0.5
    want = logits.masked_fill(torch.ones(120, 120).triu(1).bool(), -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    assert worst(out, want) < 1e-10
    bare = saccade.attention(q, k, v, "infllm(n_local=24, n_init=5, chunk=10, block=6, blocks=99, cached=99)")
    assert worst(bare, want) < 1e-10


# -- blocks ----------------------------------------------------------------------------------------------------------------


def step(method: InfLLM, q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, Any, Stream, Tensor]:
    """Context, memory and stream before the last token, and its query turned to the window's end."""
    n = k.shape[2] - 1
    turned_k, turned_q = (turn(x, torch.arange(n + 1), ROTARY) for x in (k, q))
    ctx = step_context(turned_q[:, :, -1:], turned_k, v)
    memory = method.fresh()
    for begin in range(0, n, method.chunk):
        method.take_in(ctx, memory, Stream([], turned_k, v, ROTARY), turned_q[:, :, begin : min(begin + method.chunk, n)], begin)
    return ctx, memory, Stream([], turned_k, v, ROTARY), turn(q[:, :, -1:], method.n_local, ROTARY)


def test_vectors_are_means_of_the_keys_that_following_queries_look_at() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = InfLLM(**SMALL)
    _, memory, stream, _ = step(method, q, k, v)
    blocks = method.units(100)
    assert blocks == (100 - 24 + 1 - 5) // 6 == 12
    turned_q, turned_k = (turn(x, torch.arange(101), ROTARY) for x in (q, k))
    grouped = turned_q.unflatten(1, (2, 3)).sum(2)
    received = torch.stack([(turned_k[:, :, m : m + 1] * grouped[:, :, m + 1 : m + 24]).sum(-1).mean(-1) for m in range(5, 77)], -1)
    best = received.unflatten(-1, (12, 6)).topk(2, dim=-1).indices + 5 + 6 * torch.arange(12).unsqueeze(-1)
    want = k.gather(2, best.flatten(2).unsqueeze(-1).expand(-1, -1, -1, 32)).unflatten(2, (12, 2)).mean(3)
    assert worst(method.index(memory, stream, blocks), want) < 1e-9


def test_the_block_in_whose_direction_the_query_points_comes_first() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = InfLLM(**{**SMALL, "blocks": 1})
    ctx, memory, stream, _ = step(method, q, k, v)
    vectors = method.index(memory, stream, method.units(100))
    for block in range(12):
        probe = vectors[:, :, block].repeat_interleave(3, 1).unsqueeze(2) * 3
        scores = (vectors * vectors[:, :, block : block + 1]).sum((1, 3))
        assert method.choose(ctx, memory, stream, probe, 100).tolist() == [[int(scores.argmax())]]
    norms = vectors.norm(dim=(1, 3), keepdim=True)
    memory.vectors.view.div_(norms)
    for block in range(12):
        probe = memory.vectors.view[:, :, block].repeat_interleave(3, 1).unsqueeze(2)
        assert method.choose(ctx, memory, stream, probe, 100).tolist() == [[block]]


def test_an_output_is_attention_over_window_first_keys_chosen_blocks_and_what_lies_between() -> None:
    q, k, v = stream_of(6, 2, 101)
    method = InfLLM(**{**SMALL, "blocks": 3})
    ctx, memory, stream, far = step(method, q, k, v)
    chosen = method.choose(ctx, memory, stream, far, 100)[0].tolist()
    assert len(chosen) == 3
    readable = torch.zeros(101, 101, dtype=torch.bool)
    readable[100, :5] = readable[100, 5 + 12 * 6 :] = True
    for block in chosen:
        readable[100, 5 + 6 * block : 11 + 6 * block] = True
    readable[:100, 0] = True
    want = clamped(q, k, v, 24, readable)[:, :, -1:]
    out, layer = run(method, q, k, v, [60, 40, 1])
    assert worst(out[:, :, -1:], want) < 1e-9
    assert layer.tail is not None and layer.tail.n < 24 + 5 + 6 * 4


def test_blocks_read_lately_stay_on_the_device() -> None:
    q, k, v = stream_of(4, 2, 300)
    q[:, :, 200:] = q[:, :, 200:201]  # the same question again and again
    method = InfLLM(**{**SMALL, "blocks": 2, "cached": 4})
    runner_out, layer = run(method, q, k, v, [200, *[1] * 100])
    recent = layer.sequence(None)["infllm 2"].recent
    assert recent.held[0].shape[2] == 4 and recent.loaded < 100 + 2 * 20 and bool(runner_out.isfinite().all())


@pytest.mark.slow
def test_needle_is_found_through_a_quarter_of_the_context() -> None:
    prompt = needle()
    spec = "infllm(n_local=128, n_init=16, chunk=64, block=32, representatives=1, blocks=10, cached=12)"
    text, stats, cache = told(prompt, prefill=spec)
    assert text == prompt.answer
    n = prompt.ids.shape[1]
    held = 8 * 2 * 2 * 64 * 4 * n
    assert stats.kv_bytes < 0.2 * held and on_host(cache) > 0.8 * held
    assert stats.decode_density is not None and stats.decode_density < 0.25
    assert stats.prefill_density is not None and stats.prefill_density < 0.5


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(0))
    spec = "infllm(n_local=16, n_init=2, chunk=8, block=4, representatives=2, blocks=3, cached=5)"
    with saccade.attach(model, prefill=spec) as handle, torch.no_grad():
        cache = model(ids[:, :70], use_cache=True).past_key_values
        model(ids[:, 70:71], past_key_values=cache)
        handle.save(tmp_path / "a.cache")
        want = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(71, 90)]
        again = saccade.load_cache(tmp_path / "a.cache", model)
        for i in range(71, 90):
            assert torch.equal(model(ids[:, i : i + 1], past_key_values=again).logits, want[i - 71])


@pytest.mark.parametrize("fields", ["block=0", "chunk=5000", "representatives=200", "blocks=64", "n_init=-1"])
def test_fields_out_of_range_are_refused(fields: str) -> None:
    with pytest.raises(ValueError, match="infllm"):
        saccade.methods.build(f"infllm({fields})")
