"""ZipCache: the saliency it ranks by, the life of a token in it, and what it costs in quality and bytes."""

from __future__ import annotations

import copy
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contract.models import tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import Captured, capture
from saccade.cache.parted import Part, PartedSegment
from saccade.cache.stores import CodedStore, by_token_over_heads, channel_factor
from saccade.evaluate.text import grammar
from saccade.methods.kvcomp.zipcache import ZipCache, in_classes
from saccade.ops import attend
from saccade.ops.quant import affine_quantise, dequantise
from saccade.parts.keep import best_slots
from saccade.parts.saliency import ProbeQueries, column_mass, drawn, normalised_saliency
from saccade.train.text import insert_at_lines, needle_question, needle_sentence

SHORT = "zipcache(interval=8)"


def tokens(batch: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny("llama", dtype)


def test_channel_separable_values_beat_groups_and_tokens() -> None:
    """Evidence of the card, on the segment that the method makes: values with outlier channels at 4 bits, mean relative error per
    channel."""
    generator = torch.Generator().manual_seed(1)
    size = torch.randn(512, generator=generator).exp()
    size[torch.randperm(512, generator=generator)[:8]] *= 15
    values = torch.randn(1024, 512, generator=generator) * size

    def error(restored: Tensor) -> float:
        return float(((restored - values).norm(dim=0) / values.norm(dim=0)).mean())

    token = error(dequantise(*affine_quantise(values, 4, -1)))
    groups = error(dequantise(*affine_quantise(values, 4, -1, group=32)))
    heads = values.view(1, 1024, 8, 64).transpose(1, 2)
    positions = {"positions": torch.arange(1024, dtype=torch.int32).expand(1, 8, 1024)}
    apart = in_classes(heads, heads, positions, torch.zeros(1, 1024), (4,)).read(0, 1024).values
    together = by_token_over_heads(heads, 4, channel_factor(heads)).read(0, 1024)
    in_heads, separable = (error(x.transpose(1, 2).reshape(1024, 512)) for x in (apart, together))
    assert token > 3 * groups > 4.5 * separable
    assert 0.25 < separable < 0.4
    assert in_heads < 0.9 * separable, "a head's own range is narrower than that of all heads"


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, lengths: list[int], **options: Tensor) -> tuple[Tensor, DynamicCache]:
    """Logits of ids fed in calls of these lengths, and the cache."""
    cache = DynamicCache(config=model.config)
    out, begin = [], 0
    for m in lengths:
        out.append(model(ids[:, begin : begin + m], past_key_values=cache, **options).logits)
        begin += m
    return torch.cat(out, 1), cache


def bits_of(part: Part) -> int:
    assert isinstance(part.keys, CodedStore) and isinstance(part.values, CodedStore)
    assert part.keys.packed.bits == part.values.packed.bits
    return part.keys.packed.bits


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: object) -> Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


# -- saliency ----------------------------------------------------------------------------------------------------------------


def planted(n: int = 1024, count: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention with `count` salient keys in the later three quarters: q `(1, 4, n, 64)`, k `(1, 2, n, 64)`, their slots."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, n, 64, generator=generator), torch.randn(1, 2, n, 64, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    slots = torch.randperm(n * 3 // 4 - 16, generator=generator)[:count] + n // 4
    k[:, :, slots] += direction * 6
    return q + direction * 4, k, slots


def recall(scores: Tensor, slots: Tensor) -> float:
    return float(torch.isin(scores.topk(len(slots), dim=-1).indices, slots).double().mean())


def test_normalised_saliency_finds_late_salient_tokens_where_raw_mass_does_not() -> None:
    q, k, slots = planted()
    rows = torch.arange(q.shape[2])
    normalised = recall(normalised_saliency(q, rows, k, scale=0.125), slots)
    raw = recall(column_mass(q, rows, k, scale=0.125), slots)
    assert normalised >= 0.8 and 0.3 <= raw <= 0.65
    probes = ProbeQueries(0.1, seed=0)
    probes.add(q, q.shape[2], q.shape[2])
    chosen, at = probes.rows(q.shape[2], q.shape[2])
    assert chosen is not None and chosen.shape[2] == len(at) < 130
    assert recall(normalised_saliency(chosen, at, k, scale=0.125), slots) >= 0.8


def test_column_mass_is_the_sum_of_softmax_rows() -> None:
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 9, 8)
    slots = torch.tensor([0, 3, 4, 7, 8])
    expected = torch.zeros(2, 2, 9)
    for b in range(2):
        for head in range(6):
            for i, slot in enumerate(slots.tolist()):
                expected[b, head // 3, : slot + 1] += torch.softmax(q[b, head, i] @ k[b, head // 3, : slot + 1].T * 0.3, -1)
    assert torch.allclose(column_mass(q, slots, k, scale=0.3), expected, atol=1e-5)
    capped = column_mass(q, slots, k, scale=0.3, softcap=0.5)
    assert torch.allclose(capped.sum(-1), expected.sum(-1), atol=1e-5) and not torch.allclose(capped, expected, atol=1e-3)
    counts = torch.tensor([5, 4, 4, 4, 3, 2, 2, 2, 1])
    assert torch.allclose(normalised_saliency(q, slots, k, scale=0.3), expected / counts, atol=1e-5)


def test_keys_that_no_probe_row_sees_count_as_salient() -> None:
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 6, 4)
    saliency = normalised_saliency(q, torch.tensor([3]), k, scale=1.0)
    assert torch.isinf(saliency[..., 4:]).all() and torch.isfinite(saliency[..., :4]).all()
    assert torch.isinf(normalised_saliency(None, torch.tensor([]), k, scale=1.0)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.floats(0.02, 1.0), st.integers(0, 2**40))
def test_probe_rows_do_not_depend_on_chunks(chunks: list[int], share: float, seed: int) -> None:
    n = sum(chunks)
    q = torch.arange(float(n)).view(1, 1, n, 1)
    whole, parts = ProbeQueries(share, seed), ProbeQueries(share, seed)
    whole.add(q, n, n)
    begin = 0
    for m in chunks:
        begin += m
        parts.add(q[:, :, begin - m : begin], begin, begin)
    (a, slots), (b, others) = whole.rows(n, n), parts.rows(n, n)
    assert a is not None and b is not None
    assert torch.equal(slots, others) and torch.equal(a, b)
    assert a.flatten().tolist() == slots.tolist()
    recent = -(-round(share / 2 * n, 9) // 1)
    assert slots.tolist()[-int(recent) :] == list(range(n - int(recent), n))


def test_taking_guesses_back_leaves_the_probe_rows_of_the_rest() -> None:
    q = torch.arange(200.0).view(1, 1, 200, 1)
    straight, guessed = ProbeQueries(0.1, 0), ProbeQueries(0.1, 0)
    straight.add(q[:, :, :150], 150, 150)
    guessed.add(torch.cat([q[:, :, :150], -torch.ones(1, 1, 10, 1)], 2), 160, 160)  # ten guesses at the end of the prompt
    for a, b in zip(straight.rows(150, 150), guessed.rows(150, 150), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    guessed.add(q[:, :, 150:152], 152, 152)
    last, slot = guessed.last(152, 100)
    assert last is not None and last.item() == 151 and slot.item() == 99


def test_the_draw_is_uniform_and_remembers_little() -> None:
    indices = torch.arange(200_000)
    for seed in (0, 1, 2**50):
        hits = drawn(indices, 0.05, seed)
        assert 0.047 < float(hits.double().mean()) < 0.053
        assert 0.045 < float(drawn(indices * 64, 0.05, seed).double().mean()) < 0.055
    assert not torch.equal(drawn(indices, 0.05, 0), drawn(indices, 0.05, 1))
    assert bool(drawn(indices, 1.0, 0).all()) and not bool(drawn(indices, 0.0, 0).any())
    probes = ProbeQueries(0.1, 0)
    for begin in range(0, 20_000, 500):
        probes.add(torch.zeros(1, 1, 500, 4), begin + 500, begin + 500)
    assert probes.nbytes < 0.13 * 20_000 * 4 * 4


# -- the policy on a tiny model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_lossless(dtype: torch.dtype) -> None:
    ids = tokens(2, 72)
    lengths = [60, *[1] * 12]
    exact, _ = run(llama(torch.float64), ids, lengths)
    dense, _ = run(llama(dtype), ids, lengths)
    with saccade.attach(llama(dtype), cache="zipcache(salient_bits=16, other_bits=16, interval=4)") as handle:
        got, _ = run(llama(dtype), ids, lengths)
        assert handle.stats().per_layer[0]["compressions"] == 1 + 12 // 4
    allowed = 2 * float((dense.double() - exact).abs().max()) + 1e-6
    assert float((got.double() - exact).abs().max()) <= allowed


def test_a_token_is_encoded_once_when_the_interval_is_full() -> None:
    ids = tokens(1, 120)
    with saccade.attach(llama(), cache="zipcache(interval=10)"), torch.no_grad():
        cache = DynamicCache(config=llama().config)
        llama()(ids[:, :70], past_key_values=cache)
        layer = cache.layers[0]
        assert not layer.segments  # the prompt may still go on
        seals = []
        for i in range(70, 92):
            llama()(ids[:, i : i + 1], past_key_values=cache)
            seals.append([s.length for s in layer.segments])
        assert seals[0] == [70] and seals[8] == [70] and seals[9] == [70, 10] and seals[19] == [70, 10, 10]
        first = layer.segments[0]
        assert isinstance(first, PartedSegment)
        assert [(bits_of(part), part.keys.length) for part in first.parts] == [(4, 42), (2, 28)]  # 40% of 70 in 2 bits
        positions = torch.cat([s.read(0, s.length).side["positions"] for s in layer.segments], -1)
        assert positions[0, 1].tolist() == list(range(90))


def test_decoding_ranks_by_the_current_query() -> None:
    """The classes of an interval are those of the current row's attention, computed here from the captured queries and keys."""
    ids, model = tokens(1, 60), llama()
    with torch.no_grad(), capture(model) as seen:
        model(ids)
    with saccade.attach(model, cache="zipcache(interval=20, probe_share=0.5)"):
        _, cache = run(model, ids, [40, *[1] * 20])
    # layer 0 sees the same queries and keys whatever the cache holds
    layer: Captured = seen[0]
    attention = torch.softmax(layer.q[0, :, 59].view(2, 3, -1) @ layer.k[0, :, 40:].mT * layer.scale, -1).sum(1)
    others = attention.argsort(dim=-1)[:, :8].sort(-1).values  # 40% of 20
    held = cache.layers[0].segments[1].parts[1]
    assert bits_of(held) == 2 and (held.positions[0] - 40).tolist() == others.tolist()


def test_padded_rows_equal_single_runs() -> None:
    model = llama(torch.float64)
    ids, short = tokens(1, 70), tokens(1, 50, seed=5)
    steps = tokens(2, 10, seed=6)
    for side in ("left", "right"):
        gap = torch.zeros(1, 20, dtype=torch.long)
        padded = torch.cat([gap, short] if side == "left" else [short, gap], 1)
        mask = torch.cat([(torch.cat([ids, padded]) != 0).long(), torch.ones(2, 10, dtype=torch.long)], 1)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        with saccade.attach(model, cache=SHORT), torch.no_grad():
            cache = DynamicCache(config=model.config)
            whole = torch.cat([torch.cat([ids, padded]), steps], 1)
            parts = []
            for begin, end in [(0, 70), *((i, i + 1) for i in range(70, 80))]:
                parts.append(model(
                    whole[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end], past_key_values=cache
                ).logits)  # fmt: skip
            both = torch.cat(parts[1:], 1)
            first, _ = run(model, torch.cat([ids, steps[:1]], 1), [70, *[1] * 10])
            second, _ = run(model, torch.cat([short, steps[1:]], 1), [50, *[1] * 10])
        assert float((both[0] - first[0, 70:]).abs().max()) < 1e-6
        assert float((both[1] - second[0, 50:]).abs().max()) < 1e-6


def test_a_prompt_in_chunks_equals_a_prompt_at_once() -> None:
    model, ids = llama(torch.float64), tokens(2, 110)
    with saccade.attach(model, cache=SHORT):
        whole, _ = run(model, ids, [100, *[1] * 10])
        parts, _ = run(model, ids, [3, 50, 16, 31, *[1] * 10])
    assert float((whole - parts).abs().max()) < 1e-6


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache="zipcache(salient_bits=16, other_bits=16, interval=4)"):
        lossless = {name: generate(model, ids, 10, **options) for name, options in OPTIONS.items()}
    for name, options in OPTIONS.items():
        assert torch.equal(generate(model, ids, 10, **options), lossless[name]), name
    with saccade.attach(model, cache=SHORT) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=cache)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=cache)
        assert cache.get_seq_length() == second.shape[1] - 1
        stats = handle.stats()
        assert stats.kept == [[second.shape[1] - 1] * 2] * 2  # nothing is dropped
        lengths = [s.length for s in cache.layers[0].segments]
        assert lengths == [80, 44, 8]  # the first prompt; what was left of the answer with the second prompt; an interval


OPTIONS = {"greedy": {}, "beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 5}}


def test_prompt_lookup_encodes_what_plain_decoding_encodes() -> None:
    """With one interval open, guessing changes nothing: neither the prompt's probe rows nor its classes."""
    model, ids = llama(torch.float64), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache="zipcache"):
        assert torch.equal(generate(model, ids, 12, prompt_lookup_num_tokens=5), generate(model, ids, 12))


def test_a_copied_cache_goes_on_alike_and_alone() -> None:
    model, ids, more = llama(), tokens(1, 60), tokens(1, 20, seed=3)
    with saccade.attach(model, cache=SHORT), torch.no_grad():
        _, first = run(model, ids, [57, 1, 1, 1])
        second = copy.deepcopy(first)
        for i in range(9):
            a = model(more[:, i : i + 1], past_key_values=first).logits
        for i in range(9):
            b = model(more[:, i : i + 1], past_key_values=second).logits
    assert torch.equal(a, b)


def test_taking_tokens_back_into_the_encoded_part() -> None:
    model, ids = llama(torch.float64), tokens(1, 90)
    with saccade.attach(model, cache=SHORT), torch.no_grad():
        _, cache = run(model, ids, [60, *[1] * 10])
        cache.crop(-30)
        assert cache.get_seq_length() == 40 and cache.layers[0].lengths() == [[40, 40]]
        out = model(ids[:, 40:60], past_key_values=cache).logits
        out = model(ids[:, 60:61], past_key_values=cache).logits
    assert bool(torch.isfinite(out).all()) and cache.layers[0].lengths() == [[61, 61]]


def test_fields_are_validated_and_unfit_models_refused() -> None:
    for wrong in ("salient_bits=5", "other_bits=0", "other_share=1.5", "probe_share=0", "interval=0", "interval=2.5", "salient_bits='x'"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"zipcache({wrong})")
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(tiny("deepseek-v3"), cache="zipcache")
    assert ZipCache(other_share=1).other_share == 1 and ZipCache().spec == "zipcache"


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tokens_in_one_class(share: float) -> None:
    with saccade.attach(llama(), cache=f"zipcache(other_share={share})"):
        out, cache = run(llama(), tokens(1, 40), [38, 1, 1])
    assert bool(torch.isfinite(out).all())
    (only,) = cache.layers[0].segments[0].parts
    assert (bits_of(only), only.keys.length) == (2 if share else 4, 38)


# -- on the pocket model -----------------------------------------------------------------------------------------------------


def ids_of(text: bytes) -> Tensor:
    return torch.tensor([[1, *(b + 3 for b in text)]])


def needle(n: int, depth: float, seed: int) -> tuple[Tensor, str]:
    rng, text = Random(seed), grammar()
    key, value = text.key(rng), str(rng.randrange(10**5, 10**6))
    fact, question = needle_sentence("magic number", key, value).encode(), needle_question("magic number", key).encode()
    body = insert_at_lines(text.haystack(rng, n - 1 - len(fact) - len(question)), [(depth, fact)])
    return ids_of(body + question), value


def test_a_needle_is_found_in_a_seventh_of_the_bytes() -> None:
    model, _ = saccade.pocket(dtype=torch.float32)
    ids, value = needle(2560, 0.4, seed=1)
    with saccade.attach(model, cache="zipcache") as handle:
        out = generate(model, ids, len(value))
        stats = handle.stats()
    assert bytes(int(t) - 3 for t in out[0, 2560:]).decode() == value
    # 8 layers, 2 heads, keys and values of 64 dims in 4 bytes; parameters and the tail's spare room count
    dense = 8 * 2 * 2 * 64 * 4 * stats.tokens_seen
    assert 7 < dense / stats.kv_bytes < 10


def test_salient_tokens_at_four_bits_halve_the_error_of_two_bits() -> None:
    """Attention output of the next 64 tokens over an encoded prompt, relative error, the mean over layers."""
    model, _ = saccade.pocket(dtype=torch.float32)
    n, m = 1024, 64
    with torch.no_grad(), capture(model) as layers:
        model(ids_of(grammar().haystack(Random(3), n + m - 1)))
    errors: dict[str, float] = {}
    for layer in layers:
        k, v, q = layer.k[:, :, :n], layer.v[:, :, :n], layer.q[:, :, n:]
        exact = attend(q, k, v, causal=False, scale=layer.scale).out
        probes = ProbeQueries(0.1, layer.layer)
        probes.add(layer.q[:, :, :n], n, n)
        chosen, slots = probes.rows(n, n)
        assert chosen is not None
        by_chance = torch.rand(1, 2, n, generator=torch.Generator().manual_seed(layer.layer))
        scores = {
            "saliency": normalised_saliency(chosen, slots, k, scale=layer.scale),
            "raw mass": column_mass(chosen, slots, k, scale=layer.scale), "chance": by_chance,
        }  # fmt: skip
        cases = {**{name: (score, (4, 2)) for name, score in scores.items()}, "2 bits": (by_chance, (2, 2)), "4 bits": (by_chance, (4, 4))}
        for name, (score, bits) in cases.items():
            salient, _ = best_slots(score, n - int(0.4 * n))
            classes = torch.ones(1, 2, n, dtype=torch.uint8).scatter_(2, salient, 0)
            positions = {"positions": torch.arange(n, dtype=torch.int32).expand(1, 2, n)}
            segment = in_classes(k, v, positions, classes, bits)
            out = segment.attend(q, scale=layer.scale, softcap=None).out
            errors[name] = errors.get(name, 0.0) + float((out - exact).norm() / exact.norm()) / len(layers)
    assert errors["4 bits"] < errors["saliency"] < errors["raw mass"] < errors["chance"] < errors["2 bits"]
    assert errors["saliency"] < 0.5 * errors["2 bits"] and errors["saliency"] < 0.7 * errors["chance"]
