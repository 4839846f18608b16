"""StreamingLLM (streaming-llm, 2309.17453): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.contract.models import tiny
from tests.methods.cache.needles import found, pocket, prompts, streams
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.core import Rotary
from saccade.methods import build
from saccade.methods.cache.streaming_llm import TURNED, StreamingLLM
from saccade.ops import attend
from saccade.ops.attend import ExtraKeys
from saccade.parts.rotary import turn

ROTARY = Rotary(1.0 / 100.0 ** (torch.arange(4) / 4))  # 4 pairs for head dim 8


def turned_by_place(x: Tensor) -> Tensor:
    """Rotary embedding of x `(B, H, n, D)` at places 0 ... n - 1."""
    return turn(x, torch.arange(x.shape[2]), ROTARY)


def test_equals_dense_until_the_cache_is_full() -> None:
    model, ids = llama(), tokens(2, 40)
    dense = logits(model, ids, steps=20)
    with saccade.attach(model, cache="streaming-llm(sinks=4, window=36)") as handle:
        assert error(logits(model, ids, steps=20), dense) < 1e-9
        assert handle.stats().kept == [[40, 40], [40, 40]]
    with saccade.attach(model, cache="streaming-llm(sinks=4, window=30)"):
        assert error(logits(model, ids, steps=20), dense) > 1e-3


def test_size_stays_and_places_are_contiguous() -> None:
    q, k, v = random_qkv(120)
    single = Single(StreamingLLM(sinks=3, window=20), rotary=ROTARY)
    single.feed(q[:, :, :10], k[:, :, :10], v[:, :, :10])
    for i in range(10, 120):
        single.steps(*(x[:, :, i : i + 1] for x in (q, k, v)))
        n = min(i + 1, 23)
        slots = single.layer.open()
        assert slots.length == n
        kept = [0, 1, 2, *range(i + 1 - 20, i + 1)] if i + 1 > 23 else list(range(i + 1))
        assert single.kept() == [kept, kept]
        # where the angles say that the keys stand: one run, which ends at the newest token
        places = slots.side["positions"] + slots.side.get(TURNED, torch.zeros_like(slots.side["positions"]))
        assert places[0].tolist() == [list(range(i + 1 - n, i + 1))] * 2


def test_reindexed_equals_rotating_by_place_in_the_cache() -> None:
    """The paper stores keys without angles and turns them by their place at every step, the query by the last place."""
    q, k, v = random_qkv(90, batch=2)
    sinks, window, n = 3, 14, 90
    single = Single(StreamingLLM(sinks=sinks, window=window), rotary=ROTARY)
    got = single.steps(turned_by_place(q), turned_by_place(k), v)
    for i in range(n):
        kept = list(range(i + 1))
        if i > sinks + window:
            kept = [*range(sinks), *range(i - window, i + 1)]
        keys = turned_by_place(k[:, :, kept])
        query = turn(q[:, :, i : i + 1], len(kept) - 1, ROTARY)
        expected = attend(query, keys, v[:, :, kept], impl="reference").out
        assert (got[:, :, i : i + 1] - expected).abs().max() < 1e-9, f"step {i}"


def test_original_positions_differ_from_reindexed() -> None:
    q, k, v = random_qkv(60)
    q, k = turned_by_place(q), turned_by_place(k)
    a = Single(StreamingLLM(sinks=3, window=14, positions="original")).steps(q, k, v)
    b = Single(StreamingLLM(sinks=3, window=14), rotary=ROTARY).steps(q, k, v)
    assert (a[:, :, :18] - b[:, :, :18]).abs().max() < 1e-12
    assert (a[:, :, 20:] - b[:, :, 20:]).abs().max() > 1e-2


def test_rounding_does_not_pile_up() -> None:
    """After hundreds of turns a bfloat16 sink is one rounding away from its exact angle."""
    q, k, v = (x.bfloat16() for x in random_qkv(600))
    single = Single(StreamingLLM(sinks=4, window=12), rotary=ROTARY)
    single.steps(q, k, v)
    exact = turn(k[:, :, :4].double(), 600 - 16, ROTARY)
    assert torch.equal(single.layer.open().keys[:, :, :4], exact.float().bfloat16())


def test_sinks_that_were_taken_back_are_written_anew() -> None:
    q, k, v = random_qkv(80)
    single = Single(StreamingLLM(sinks=4, window=10), rotary=ROTARY)
    single.feed(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    single.end_prompt()
    single.layer.crop(-28)
    single.steps(*(x[:, :, 30:80] for x in (q, k, v)))
    slots = single.layer.open()
    assert slots.side["positions"][0, 0].tolist() == [0, 1, 2, 3, *range(42, 52)]
    original = torch.cat([k[:, :, :2], k[:, :, 30:32]], dim=2)
    assert (slots.keys[:, :, :4] - turn(original, 52 - 14, ROTARY)).abs().max() < 1e-12


@pytest.mark.parametrize("spec", ["streaming-llm(sinks=2, window=20)", "streaming-llm(sinks=0, window=20)"])
def test_generates_in_every_way(spec: str) -> None:
    model, ids = llama(), tokens(1, 30).repeat(1, 2)
    with saccade.attach(model, cache=spec) as handle:
        assert greedy(model, ids, 8).shape == (1, 68)
        assert handle.stats().kept == [[20 + build(spec).sinks] * 2] * 2
        assert greedy(model, ids, 8, num_beams=2).shape == (1, 68)
        assert greedy(model, ids, 8, prompt_lookup_num_tokens=4).shape == (1, 68)


def test_refused_where_keys_cannot_be_turned() -> None:
    ids = tokens(1, 40)
    dynamic = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )).eval()  # fmt: skip
    without, latents = "no rotary embedding.*positions=", "one latent.*positions="
    for model, why in ((tiny("gpt2"), without), (dynamic, without), (tiny("deepseek-v3"), latents)):
        with pytest.raises(ValueError, match=why), saccade.attach(model, cache="streaming-llm(window=16)"):
            greedy(model, ids, 2)
        for spec in ('streaming-llm(window=16, positions="original")', "streaming-llm(sinks=0, window=16)"):
            with saccade.attach(model, cache=spec):
                assert greedy(model, ids, 4).shape == (1, 44)


def test_layers_without_positions_keep_their_keys() -> None:
    """In SmolLM3 every fourth layer has no rotary embedding: its sinks must not be turned."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.SmolLM3Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip
    ids, cache = tokens(1, 60), DynamicCache(config=model.config)
    with torch.no_grad(), saccade.attach(model, cache="streaming-llm(sinks=4, window=16)") as handle:
        model(ids, past_key_values=cache)
        before = [layer.keys[:, :, :4].clone() for layer in cache.layers]
        handle.compress()
    after = [layer.keys[:, :, :4] for layer in cache.layers]
    changed = [error(new, old) > 1e-3 for new, old in zip(after, before, strict=True)]
    assert changed == [True, True, True, False]


def test_softmax1_is_a_sink_with_zero_logit_and_zero_value() -> None:
    q, k, v = random_qkv(40)
    sink = ExtraKeys(k.new_zeros(1, 2, 1, 8), v.new_zeros(1, 2, 1, 8))
    got = attend(q, k, v, extra_keys=sink).out
    weights = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT / math.sqrt(8)).exp().tril()
    softmax1 = weights / (1 + weights.sum(-1, keepdim=True))
    assert (got - (softmax1 @ v.unsqueeze(2)).flatten(1, 2)).abs().max() < 1e-9


@torch.no_grad()
def bits(spec: str | None, ids: Tensor, after: int, piece: int = 16) -> float:
    """Bits per byte after the first `after` bytes of streams that are fed `piece` tokens at a time."""
    model, cache = pocket(), DynamicCache(config=pocket().config)
    losses = []
    with saccade.attach(model, cache=spec, when="call"):
        for begin in range(0, ids.shape[1] - 1, piece):
            end = min(begin + piece, ids.shape[1] - 1)
            scores = model(ids[:, begin:end], past_key_values=cache).logits.mT
            losses.append(torch.nn.functional.cross_entropy(scores, ids[:, begin + 1 : end + 1], reduction="none"))
    return float(torch.cat(losses, 1)[:, after:].mean()) / math.log(2)


@torch.no_grad()
def recomputed(ids: Tensor, context: int, after: int, piece: int = 16) -> float:
    """Bits per byte of a sliding window whose keys are computed anew for every piece (the slow baseline)."""
    losses = []
    for begin in range(after, ids.shape[1] - 1, piece):
        end = min(begin + piece, ids.shape[1] - 1)
        first = max(0, end - context - piece // 2)
        scores = pocket()(ids[:, first:end]).logits[:, begin - first :].mT
        losses.append(torch.nn.functional.cross_entropy(scores, ids[:, begin + 1 : end + 1], reduction="none"))
    return float(torch.cat(losses, 1).mean()) / math.log(2)


def test_pocket_needs_its_sinks() -> None:
    """Bits per byte of streams five times as long as the cache: 0.99 dense, 1.16 with sinks,
    1.41 with a window alone, 1.65 with a window recomputed."""
    ids = streams(2, 320)
    dense = bits(None, ids, 64)
    window = bits("streaming-llm(sinks=0, window=64)", ids, 64)
    sinks = bits("streaming-llm(sinks=4, window=60)", ids, 64)
    assert dense < sinks < window - 0.1
    # a window that keeps its keys has seen more than it holds, so it may well beat recomputation
    assert sinks < recomputed(ids, 64, 64)


@pytest.mark.slow
def test_pocket_forgets_what_has_left_the_window() -> None:
    """No long-range memory: a needle is found inside the window and lost outside it."""
    ids, answers = prompts(768, (0.05, 0.95))
    spec = "streaming-llm(window=256)"
    assert found(ids, answers, None) == [True, True]
    assert found(ids, answers, spec) == [False, True]


@pytest.mark.parametrize("fields", ["sinks=-1", "window=0", 'positions="absolute"'])
def test_fields_are_checked(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        build(f"streaming-llm({fields})")
