"""KVQuant: why keys go before RoPE, what codebooks and outliers save, and the cache in a few bits."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.kvcomp.stage import OPTIONS, answered, generate, ids_of, llama, needle, run, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.cache.codebook import CodebookStore, SparseList
from saccade.core import HeadLayout, LayerContext, Plan, Rotary
from saccade.evaluate.text import grammar
from saccade.methods.kvcomp.kvquant import KVQuant
from saccade.ops import attend
from saccade.ops.quant import codebook, codebook_decode, codebook_encode, split_outliers
from saccade.parts.rotary import turn

ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))
SHORT = KVQuant(bits=3, interval=8)


@cache
def plan_of(method: KVQuant, dtype: torch.dtype = torch.float32) -> Plan:
    return saccade.calibrate(llama(dtype), method, [tokens(2, 96, seed=9), tokens(1, 96, seed=10)])


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


# -- the numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_keys_lose_least_per_channel_before_rope(bits: int) -> None:
    """Keys of which a few channels have a large mean: relative error after RoPE, uniform steps."""
    n, dim = 1024, 64
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(1, 1, n, dim, generator=generator)
    before[..., [3, 12, 40]] += torch.tensor([12.0, -9.0, 15.0])
    rotary = Rotary(10000.0 ** (-torch.arange(32) / 32))
    places = torch.arange(n)
    after = turn(before, places, rotary)

    def uniform(x: Tensor, axis: int) -> Tensor:
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        step = (high - low) / (2**bits - 1)
        return low + step * ((x - low) / step).round()

    errors = [relative(y, after) for y in (uniform(after, 3), uniform(after, 2), turn(uniform(before, 2), places, rotary))]
    assert errors[0] > 1.5 * errors[1] and errors[1] > 1.05 * errors[2]


def test_codebook_and_outliers_each_save_on_heavy_tails() -> None:
    """Student t with 4 degrees of freedom at 3 bits: uniform > codebook > uniform with 1% apart > codebook with 1% apart."""
    generator = torch.Generator().manual_seed(0)
    # a normal over the root of a chi-squared with 4 degrees of freedom
    x = torch.randn(32, 2048, generator=generator) / (torch.randn(32, 2048, 4, generator=generator).square().mean(-1)).sqrt()

    def uniform(y: Tensor) -> Tensor:
        low, high = y.amin(1, keepdim=True), y.amax(1, keepdim=True)
        step = (high - low) / 7
        return low + step * ((y - low) / step).round()

    def fitted(y: Tensor) -> Tensor:
        low, high = y.amin(1, keepdim=True), y.amax(1, keepdim=True)
        middle, half = (high + low) / 2, (high - low) / 2
        unit = (y - middle) / half
        levels = codebook(unit.flatten(), 3)
        return codebook_decode(codebook_encode(unit, levels), levels) * half + middle

    dense, kept, places = split_outliers(x, 0.01)
    errors = [relative(quantise(x), x) for quantise in (uniform, fitted)]
    errors += [relative(quantise(dense).scatter(1, places.long(), kept), x) for quantise in (uniform, fitted)]
    assert errors == sorted(errors, reverse=True)
    assert errors == pytest.approx([0.64, 0.39, 0.27, 0.18], abs=0.08)


def context(method: KVQuant, samples: list[tuple[Tensor, Tensor, Tensor]]) -> LayerContext:
    """The context of a layer that was calibrated on these (q, k, v)."""
    q, k, v = samples[0]
    ctx = LayerContext(
        layer=0, layers=1, layout=HeadLayout.of(q, k, v), scale=0.25, rotary=ROTARY,
        attend=lambda q, k, v, selection, **options: attend(q, k, v, selection, scale=0.25, **options).out,
    )  # fmt: skip
    sums: dict[str, Tensor] = {}
    for q, k, v in samples:
        sums = method.combine(sums, method.measure_gradient(ctx, q, k, v, torch.ones(*q.shape[:3], v.shape[-1])))
    found = method.conclude_all({0: sums})[0]
    ctx.plan = Plan(slug="kvquant", spec=method.spec, fingerprint="", tensors={f"layer.0.{k}": x for k, x in found.items()}, notes={})
    return ctx


def samples(n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 16, generator=generator) for h in (6, 2, 2))
    return q, k * torch.arange(1.0, 17.0), v


def test_gradients_are_those_of_the_loss_to_keys_before_rope_and_values() -> None:
    q, k, v = samples(30)
    method = KVQuant(sinks=2)
    ctx = context(method, [(q, k, v)])
    d_out = torch.randn(2, 6, 30, 16, generator=torch.Generator().manual_seed(5))
    found = method.measure_gradient(ctx, q, k, v, d_out)
    places = torch.arange(30)
    before, values = turn(k, -places, ROTARY).requires_grad_(), v.clone().requires_grad_()
    with torch.enable_grad():
        (ctx.attend(q, turn(before, places, ROTARY), values, None) * d_out).sum().backward()
    for name, x, grad in (("key", before, before.grad), ("value", values, values.grad)):
        assert torch.allclose(found[f"{name}s"], x.detach()[:, :, 2:].transpose(1, 2).flatten(0, 1), atol=1e-5)
        assert torch.allclose(found[f"{name} weights"], (grad[:, :, 2:] ** 2).transpose(1, 2).flatten(0, 1), rtol=1e-3, atol=1e-6)


def test_bounds_are_quantiles_and_q_norm_keeps_mean_and_deviation() -> None:
    batch = samples(400)
    method = KVQuant(bits=2, outliers=0.1)
    ctx = context(method, [batch])
    before = turn(batch[1], -torch.arange(400), ROTARY)[:, :, 1:].transpose(1, 2).flatten(0, 1)
    low, high = ctx.found("key_low"), ctx.found("key_high")
    assert float((before < low).double().mean()) == pytest.approx(0.05, abs=0.005)
    assert float((before > high).double().mean()) == pytest.approx(0.05, abs=0.005)
    unit = (before - (high + low) / 2) / ((high - low) / 2)
    inside = unit[unit.abs() <= 1]
    read = codebook_decode(codebook_encode(inside, ctx.found("key_levels")), ctx.found("key_restored"))
    plain = codebook_decode(codebook_encode(inside, ctx.found("key_levels")), ctx.found("key_levels"))
    assert float(read.mean()) == pytest.approx(float(inside.mean()), abs=1e-3)
    assert float(read.std()) == pytest.approx(float(inside.std()), rel=1e-3)
    assert abs(float(plain.std()) - float(inside.std())) > 0.01
    assert torch.equal(*(context(KVQuant(bits=3), [batch]).found(f"key_{name}") for name in ("levels", "restored")))


def test_calibration_keeps_a_fixed_number_of_tokens_of_all_samples() -> None:
    method = KVQuant(fit_tokens=300)
    whole, parts = {}, {}
    found = [{"keys": torch.arange(200.0) + 200 * i, "tokens": torch.tensor(200)} for i in range(6)]
    for part in found:
        parts = method.combine(parts, part)
    whole = method.combine(whole, {"keys": torch.arange(1200.0), "tokens": torch.tensor(1200)})
    assert torch.equal(whole["keys"], parts["keys"]) and len(whole["keys"]) == 300 and int(parts["tokens"]) == 1200
    assert torch.equal(whole["number"].float(), whole["keys"])
    assert all(30 <= int(((whole["keys"] // 200) == i).sum()) <= 70 for i in range(6))


# -- storage -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 2])
def test_outliers_come_back_as_they_were_and_the_rest_at_the_nearest_level(cap: int | None) -> None:
    batch = samples(200)
    method = KVQuant(bits=3, outliers=0.1, cap=cap)
    ctx = context(method, [batch])
    keys, values = samples(60, seed=3)[1:]
    key_store, value_store = method._encode(ctx, keys, values)
    assert isinstance(key_store, CodebookStore) and isinstance(value_store, CodebookStore)
    low, high = (ctx.found(name).unsqueeze(1) for name in ("key_low", "key_high"))
    middle, half = (high + low) / 2, (high - low) / 2
    outside = (keys < low) | (keys > high)
    read = key_store.read(0, 60)
    levels = ctx.found("key_levels")
    nearest = codebook_decode(codebook_encode((keys - middle) / half, levels), levels) * half + middle
    if cap is None:
        assert torch.equal(read[outside], keys[outside])
        assert torch.allclose(read[~outside], nearest[~outside], atol=1e-5)
    listed = key_store.outliers.offsets.diff(dim=-1)
    assert torch.equal(listed.long(), outside.sum((1, 3)).clamp(max=99 if cap is None else cap))
    # values: the three most extreme of the 32 channels of a token, over both heads
    assert bool((value_store.outliers.offsets.diff(dim=-1) == 3).all())
    # the bounds are those of the others
    dense, _, _ = split_outliers(values.transpose(1, 2).flatten(2), 0.1)
    middle, half = (x[:, 0, :, 0] for x in (value_store.middle, value_store.half))
    assert torch.allclose(middle + half, dense.amax(-1)) and torch.allclose(middle - half, dense.amin(-1))
    error = (value_store.read(0, 60) - values).transpose(1, 2).flatten(2)
    assert int((error == 0).sum(-1).min()) >= 3
    assert torch.equal(value_store.read(17, 40), value_store.read(0, 60)[:, :, 17:40])
    turned = value_store.take_rows(torch.tensor([1, 0, 1])).read(0, 60)
    assert torch.equal(turned, value_store.read(0, 60)[[1, 0, 1]])


def test_a_sparse_list_is_a_sparse_list() -> None:
    x = torch.randn(3, 2, 50, 5, generator=torch.Generator().manual_seed(0))
    mask = x > 1
    listed = SparseList.of(x, mask)
    wanted = torch.where(mask, x, 0.0)
    assert torch.equal(listed.put(torch.zeros_like(x), 0), wanted)
    assert torch.equal(listed.put(torch.zeros_like(x[:, :, 10:31]), 10), wanted[:, :, 10:31])
    assert torch.equal(listed.take_rows(torch.tensor([2, 2, 0])).put(torch.zeros_like(x), 0), wanted[[2, 2, 0]])
    assert listed.nbytes == 3 * 51 * 4 + int(mask.sum()) * 6
    empty = SparseList.of(x, torch.zeros_like(mask))
    assert torch.equal(empty.put(x, 0), x) and empty.take_rows(torch.tensor([1])).nbytes == 51 * 4


def test_a_token_costs_its_bits_and_its_bounds() -> None:
    model, ids = llama(torch.bfloat16), tokens(1, 201)
    method = KVQuant(bits=4, outliers=0.05)
    with saccade.attach(model, cache=method, plan=plan_of(method)):
        _, cache = run(model, ids, [200, 1])
    first, rest = cache.layers[0].segments[0].parts
    assert first.positions[0, 0].tolist() == [0] and rest.keys.length == 199
    listed = [len(store.outliers.channel) for store in (rest.keys, rest.values)]
    assert listed[1] == 199 * 2 and 100 < listed[0] < 1000
    # codes of 16 channels in 2 heads, offsets, (index, entry) pairs; for values two bounds a token
    assert rest.keys.nbytes == 199 * 2 * 8 + 200 * 4 + listed[0] * 4
    assert rest.values.nbytes == 199 * 2 * 8 + 200 * 4 + listed[1] * 4 + 199 * 4


# -- the policy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KVQuant(bits=16), KVQuant(outliers=1.0, interval=4)], ids=lambda m: m.spec)
def test_sixteen_bits_and_everything_apart_are_exact(method: KVQuant) -> None:
    model, ids = llama(torch.float64), tokens(2, 70)
    dense, _ = run(model, ids, [60, *[1] * 10])
    with saccade.attach(model, cache=method, plan=plan_of(method, torch.float64)):
        got, cache = run(model, ids, [60, *[1] * 10])
    assert float((got - dense).abs().max()) < 1e-9
    assert bool(cache.layers[0].segments) == (method.bits != 16)


def test_more_bits_lose_less() -> None:
    model, ids = llama(torch.float64), tokens(2, 105)
    dense, _ = run(model, ids, [100, *[1] * 5])
    errors = []
    for bits in (2, 3, 4, 8):
        method = KVQuant(bits=bits)
        with saccade.attach(model, cache=method, plan=plan_of(method, torch.float64)):
            got, _ = run(model, ids, [100, *[1] * 5])
        errors.append(relative(got[:, 100:], dense[:, 100:]))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_reading_turns_keys_to_their_places_and_adds_outliers() -> None:
    """The segment's attention is dense attention over what it restores, whichever way it is cut."""
    model, ids = llama(torch.float64), tokens(2, 90)
    with saccade.attach(model, cache=SHORT, plan=plan_of(SHORT, torch.float64)):
        _, cache = run(model, ids, [80, 1])
        _, plain = run(model, ids, [80])
    segment, held = cache.layers[0].segments[0], plain.layers[0]
    part = segment.read(0, 80)
    assert relative(part.keys, held.keys[:, :, :80]) < 0.3 and torch.equal(part.keys[:, :, :1], held.keys[:, :, :1])
    for m in (1, 20):
        q = torch.randn(2, 6, m, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        wanted = attend(q, part.keys, part.values, causal=False, scale=0.3, return_lse=True)
        got = segment.attend(q, scale=0.3, softcap=None)
        assert float((got.out - wanted.out).abs().max()) < 1e-9 and float((got.lse - wanted.lse).abs().max()) < 1e-9


def test_padding_does_not_move_keys() -> None:
    model = llama(torch.float64)
    short, steps = tokens(1, 50, seed=5), tokens(2, 4, seed=6)
    batch = torch.cat([tokens(1, 70), torch.cat([torch.zeros(1, 20, dtype=torch.long), short], 1)])
    mask = torch.cat([(batch != 0).long(), torch.ones(2, 4, dtype=torch.long)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with saccade.attach(model, cache=SHORT, plan=plan_of(SHORT, torch.float64)), torch.no_grad():
        cache = DynamicCache(config=model.config)
        whole, parts = torch.cat([batch, steps], 1), []
        for begin, end in [(0, 70), *((i, i + 1) for i in range(70, 74))]:
            parts.append(model(
                whole[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end], past_key_values=cache
            ).logits)  # fmt: skip
        alone, _ = run(model, torch.cat([short, steps[1:]], 1), [50, *[1] * 4])
    assert float((torch.cat(parts[1:], 1)[1] - alone[0, 50:]).abs().max()) < 1e-6


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache=SHORT, plan=plan_of(SHORT)) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=cache)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=cache)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2
        assert [s.length for s in cache.layers[0].segments] == [80, 44, 8]
        cache.crop(-60)
        assert cache.layers[0].lengths() == [[75, 75]]


def test_after_an_eviction_policy_it_encodes_what_is_left() -> None:
    model, ids = llama(), tokens(1, 110)
    with saccade.attach(model, cache=f"snapkv(budget=40, window=8)|{SHORT.spec}", plan=plan_of(SHORT)):
        out, cache = run(model, ids, [100, *[1] * 10])
    assert bool(torch.isfinite(out).all()) and [s.length for s in cache.layers[0].segments] == [40, 8]


def test_fields_are_validated_and_unfit_models_and_plans_refused() -> None:
    for wrong in ("bits=1", "bits=5", "outliers=1.5", "cap=-1", "sinks=-1", "q_norm=2", "interval=0", "fit_tokens=3"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"kvquant({wrong})")
    with pytest.raises(ValueError, match="needs a calibration plan"):
        saccade.attach(llama(), cache="kvquant")
    with pytest.raises(ValueError, match="rotary"):
        saccade.calibrate(tiny("gpt2"), "kvquant", [tokens(1, 20)])
    with saccade.attach(llama(), cache="kvquant(bits=4)", plan=plan_of(SHORT)), pytest.raises(ValueError, match="bits=4"):
        run(llama(), tokens(1, 20), [19, 1])


# -- on the pocket model -----------------------------------------------------------------------------------------------------


def test_on_the_pocket_model_a_needle_is_found_at_four_bits() -> None:
    model, _ = saccade.pocket(dtype=torch.float32)
    text = ids_of(grammar().haystack(Random(100), 511))
    plan = saccade.calibrate(model, "kvquant", [text])
    ids, value = needle(1024, 0.4, seed=1)
    found, share = answered(ids, value, cache="kvquant", plan=plan)
    assert found and share < 0.24  # of 32 bits: 4, bounds, outliers, and the tail's room
