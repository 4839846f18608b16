"""ThinK: which channels go, what that costs in the products, and that thinned keys are those keys with zeros."""

from __future__ import annotations

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.kvcomp.stage import OPTIONS, answered, generate, llama, needle, pocket_layers, run, spread_keys, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.methods import build
from saccade.methods.kvcomp.think import ThinK, key_scores

SHORT = "think(share=0.75, recent=4, observed=8)"


def uneven(seed: int) -> tuple[Tensor, Tensor]:
    """Queries `(1, 4, 32, 64)` whose energy sits on other channels than that of keys `(1, 2, 300, 64)`."""
    generator = torch.Generator().manual_seed(seed)
    keys = spread_keys(n=300, dim=64, seed=seed)
    energy = torch.randn(2, 1, 64, generator=generator).exp().repeat_interleave(2, 0)
    return torch.randn(1, 4, 32, 64, generator=generator) * energy, keys


def lost(q: Tensor, k: Tensor, scores: Tensor, count: int) -> tuple[float, Tensor]:
    """Norm of Q K^T less that of the channels kept, when the `count` lowest-scored channels of each head are removed; and those."""
    gone = scores.argsort(dim=-1, stable=True)[..., :count]
    mask = torch.zeros(scores.shape).scatter(-1, gone, 1.0).repeat_interleave(2, 1).unsqueeze(2)
    return float((((q * mask).unflatten(1, (2, 2)) @ k.mT.unsqueeze(2)) ** 2).sum().sqrt()), gone


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_query_driven_channels_lose_less_than_key_norms_and_chance(seed: int) -> None:
    q, k = uneven(seed)
    count = int(0.4 * 64)
    driven, gone = lost(q, k, key_scores(q, k), count)
    by_norm, _ = lost(q, k, k.norm(dim=2), count)
    by_chance, _ = lost(q, k, torch.rand(1, 2, 64, generator=torch.Generator().manual_seed(seed)), count)
    assert driven < 0.5 * by_norm and by_norm < by_chance
    # never more than the sum of the removed channels' scores
    assert driven <= float(key_scores(q, k).gather(-1, gone).sum())


def test_a_score_is_the_norm_of_a_channels_products() -> None:
    q, k = uneven(3)
    scores = key_scores(q, k)
    for head, channel in ((0, 0), (1, 17)):
        products = q[0, 2 * head : 2 * head + 2, :, channel].reshape(-1, 1) @ k[0, head, :, channel].reshape(1, -1)
        assert float(scores[0, head, channel]) == pytest.approx(float(products.norm()), rel=1e-5)


@pytest.mark.parametrize("spec", [SHORT, "think(share=0.5, recent=4, observed=8, value_share=0.5)"])
def test_thinned_keys_are_keys_with_zeros_in_the_same_place(spec: str) -> None:
    """The model's next logits are those of a dense model whose cache has zeros in the removed channels."""
    model, ids = llama(torch.float64), tokens(2, 61)
    with saccade.attach(model, cache=spec):
        got, cache = run(model, ids, [60, 1])
        read = [layer.segments[0].read(0, 56) for layer in cache.layers]
    method = build(spec)
    assert isinstance(method, ThinK)
    removed = (int(method.share * 16), int(method.value_share * 16))
    _, plain = run(model, ids, [60])
    for layer, part in zip(plain.layers, read, strict=True):
        assert part.side["positions"][0, 0].tolist() == list(range(56))
        for own, thin, gone in ((layer.keys, part.keys, removed[0]), (layer.values, part.values, removed[1])):
            kept = thin != 0
            assert bool((kept.any(2).sum(-1) == 16 - gone).all())
            assert torch.equal(thin, torch.where(kept, own[:, :, :56], 0.0))
            own[:, :, :56] = thin
    with torch.no_grad():
        wanted = model(ids[:, 60:], past_key_values=plain).logits
    assert float((got[:, 60:] - wanted).abs().max()) < 1e-9


def test_bytes_are_freed_and_new_keys_stay_whole() -> None:
    model, ids = llama(), tokens(1, 220)
    with saccade.attach(model) as handle:
        run(model, ids, [200, *[1] * 20])
        full = handle.stats().kv_bytes
    with saccade.attach(model, cache="think(share=0.5, recent=8)") as handle:
        _, cache = run(model, ids, [200, *[1] * 20])
        stats = handle.stats()
        assert [s.length for s in cache.layers[0].segments] == [192] and cache.layers[0].tail.n == 28
        assert stats.kept == [[220, 220]] * 2
    assert 0.7 < stats.kv_bytes / full < 0.85  # half of the keys, a quarter of all


@pytest.mark.parametrize("spec", ["think(share=0.0)", "think(recent=1000)"])
def test_nothing_removed_is_dense(spec: str) -> None:
    model, ids = llama(torch.float64), tokens(2, 70)
    dense, _ = run(model, ids, [60, *[1] * 10])
    with saccade.attach(model, cache=spec):
        assert float((run(model, ids, [60, *[1] * 10])[0] - dense).abs().max()) < 1e-9


def test_after_an_eviction_policy_it_thins_what_is_left() -> None:
    model, ids = llama(), tokens(2, 120)
    with saccade.attach(model, cache=f"snapkv(budget=40, window=8)|{SHORT}") as handle:
        out, cache = run(model, ids, [110, *[1] * 10])
        stats = handle.stats()
    assert stats.kept == [[50, 50]] * 2 and bool(torch.isfinite(out).all())
    part = cache.layers[0].segments[0]
    assert part.length == 36 and part.parts[0].keys.read(0, 36).shape == (2, 2, 36, 4)
    positions = part.read(0, 36).side["positions"]
    assert bool((positions.diff(dim=-1) > 0).all()) and int(positions.max()) < 110 - 4


def test_quantised_keys_are_near_the_thinned_ones() -> None:
    model, ids = llama(torch.float64), tokens(1, 80)
    outs = {}
    for bits in (16, 8, 2):
        with saccade.attach(model, cache=f"think(share=0.4, recent=4, key_bits={bits})"):
            outs[bits], cache = run(model, ids, [79, 1])
    bytes_held = cache.layers[0].segments[0].parts[0].keys.nbytes
    # 75 tokens, 2 heads, 10 of 16 channels in 2 bits, and 3 groups of scales and zeros in 8 bytes
    assert bytes_held == 75 * 2 * 4 + 2 * 2 * 3 * 10 * 8
    eight, two = (float((outs[bits] - outs[16])[:, -1].norm() / outs[16][:, -1].norm()) for bits in (8, 2))
    assert eight < 0.02 < two


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache=SHORT) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=cache)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=cache)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2  # no position is dropped
        assert [s.length for s in cache.layers[0].segments] == [76, 44]
        cache.crop(-60)
        assert cache.layers[0].lengths() == [[75, 75]]


def test_fields_are_validated_and_unfit_models_refused() -> None:
    for wrong in ("share=1.0", "share=-0.1", "value_share=2", "recent=-1", "observed=0", "key_bits=5", "group=0", "recent=1.5"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"think({wrong})")
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(tiny("deepseek-v3"), cache="think")
    assert ThinK().spec == "think"


def test_on_the_pocket_model_forty_percent_of_key_channels_go_unnoticed() -> None:
    ids, value = needle(1024, 0.4, seed=1)
    found, share = answered(ids, value, cache="think")
    assert found and 0.78 < share < 0.88  # a fifth of the bytes less, and the tail's spare room


def test_on_the_pocket_model_query_driven_is_best() -> None:
    totals = [0.0, 0.0, 0.0]
    for layer in pocket_layers(512):
        q, k = layer.q[:, :, -32:], layer.k
        chance = torch.rand(1, 2, 64, generator=torch.Generator().manual_seed(layer.layer))
        for i, scores in enumerate((key_scores(q, k), k.norm(dim=2), chance)):
            mask = torch.zeros(1, 2, 64).scatter(-1, scores.argsort(dim=-1)[..., :25], 1.0).repeat_interleave(3, 1).unsqueeze(2)
            products = q.unflatten(1, (2, 3)) @ k.mT.unsqueeze(2)
            error = (q * mask).unflatten(1, (2, 3)) @ k.mT.unsqueeze(2)
            totals[i] += float(error.norm() / products.norm())
    assert totals[0] < totals[1] < totals[2]
