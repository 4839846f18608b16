"""MatryoshkaKV: coordinates of which the first few serve, ranks for a budget, and a cache that holds no more than those."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.kvcomp.stage import OPTIONS, answered, generate, ids_of, llama, needle, pocket_layers, run, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.cache.rotated import Bases, RotatedSegment
from saccade.core import Plan, merge
from saccade.evaluate.text import grammar
from saccade.methods.kvcomp.matryoshkakv import MatryoshkaKV
from saccade.ops import attend
from saccade.parts.cayley import cayley, inverse_cayley, signed
from saccade.parts.pca import principal_basis, second_moment
from saccade.parts.rank_search import LEVELS, error_table, even_shares, greedy_shares, levels_at

SHORT = "matryoshkakv(recent=4, interval=8)"


@cache
def plan_of(dtype: torch.dtype = torch.float32) -> Plan:
    return saccade.calibrate(llama(dtype), "matryoshkakv", [tokens(2, 96, seed=9), tokens(1, 96, seed=10)])


def random_basis(heads: int, dim: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(heads, dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Basis and mean of entries `(B, H, n, D)`."""
    mean = x.double().mean((0, 2))
    return principal_basis(second_moment(x) / x[:, 0, :, 0].numel() - mean.unsqueeze(-1) * mean.unsqueeze(-2))[0].double(), mean


def low_rank(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `(2, 6, 5, 32)`; keys and values `(2, 2, 300, 32)` float64 of about 6 directions, with a mean."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    k, v = (draw(2, 2, 300, 6) @ draw(2, 6, 32) + 2 * draw(2, 1, 32) + 0.1 * draw(2, 2, 300, 32) for _ in range(2))
    return draw(2, 6, 5, 32), k, v


Pair = tuple[Tensor, Tensor]  # basis and mean


def segment_of(k: Tensor, v: Tensor, key: Pair, value: Pair, ranks: list[tuple[int, int]]) -> RotatedSegment:
    bases = Bases(key_basis=key[0], key_mean=key[1], value_basis=value[0], value_mean=value[1])
    positions = torch.arange(k.shape[2], dtype=torch.int32).expand(k.shape[:3])
    return RotatedSegment.encode(k, v, positions, bases, ranks)


# -- coordinates -------------------------------------------------------------------------------------------------------------


def test_cayley_goes_to_orthogonal_matrices_and_back() -> None:
    bases = random_basis(4, 24, seed=0)
    bases[0] = -torch.eye(24)  # nothing but eigenvalues of -1
    bases[1, :, 0] *= -1 if float(torch.linalg.det(bases[1])) > 0 else 1
    turned = signed(bases)
    assert torch.equal(turned.abs(), bases.abs()) and bool(torch.allclose(torch.linalg.det(turned), torch.ones(4).double()))
    x = inverse_cayley(turned)
    assert torch.equal(x, x.tril(-1)) and float((cayley(x) - turned).abs().max()) < 1e-10
    anything = cayley(3 * torch.randn(2, 24, 24, generator=torch.Generator().manual_seed(1)))
    assert float((anything @ anything.mT - torch.eye(24)).abs().max()) < 1e-5


@pytest.mark.parametrize("m", [1, 5, 20])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_all_ranks_are_full_attention_for_any_basis(m: int, softcap: float | None) -> None:
    """Beside an exact tail: the segment weighs what it should."""
    _, k, v = low_rank()
    q = torch.randn(2, 6, m, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    basis = random_basis(2, 32, seed=1), torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    segment = segment_of(k[:, :, :250], v[:, :, :250], basis, (random_basis(2, 32, seed=3), basis[1]), [(32, 32)] * 2)
    tail = attend(q, k[:, :, 250:], v[:, :, 250:], causal=False, scale=0.1, softcap=softcap, return_lse=True)
    got = merge(segment.attend(q, scale=0.1, softcap=softcap), tail)
    wanted = attend(q, k, v, causal=False, scale=0.1, softcap=softcap, return_lse=True)
    assert float((got.out - wanted.out).abs().max()) < 1e-9 and float((got.lse - wanted.lse).abs().max()) < 1e-9
    assert float((segment.read(10, 60).keys - k[:, :, 10:60]).abs().max()) < 1e-9


def test_ragged_ranks_attend_over_what_they_restore_and_take_no_more_room() -> None:
    q, k, v = low_rank()
    segment = segment_of(k, v, principal(k), principal(v), [(8, 16), (4, 32)])
    assert segment.kv_bytes == 2 * 300 * (8 + 16 + 4 + 32) * 8
    part = segment.read(0, 300)
    wanted = attend(q, part.keys, part.values, causal=False, scale=0.3, return_lse=True)
    got = segment.attend(q, scale=0.3, softcap=None)
    assert float((got.out - wanted.out).abs().max()) < 1e-9 and float((got.lse - wanted.lse).abs().max()) < 1e-9
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(segment.take_rows(rows).attend(q[rows], scale=0.3, softcap=None).out, got.out[rows])
    shorter = segment.before(100)
    assert shorter.length == 100
    wanted = attend(q, part.keys[:, :, :100], part.values[:, :, :100], causal=False, scale=0.3)
    assert float((shorter.attend(q, scale=0.3, softcap=None).out - wanted.out).abs().max()) < 1e-9


def test_error_falls_with_rank_and_principal_directions_beat_chance() -> None:
    q, k, v = low_rank()
    wanted = attend(q, k, v, causal=False, scale=0.1).out
    errors = []
    for level in range(1, LEVELS + 1):
        got = segment_of(k, v, principal(k), principal(v), [(4 * level, 4 * level)] * 2).attend(q, scale=0.1, softcap=None)
        errors.append(float((got.out - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    by_chance = segment_of(k, v, (random_basis(2, 32, 5), principal(k)[1]), (random_basis(2, 32, 6), principal(v)[1]), [(8, 8)] * 2)
    assert errors[1] < 0.1 * float((by_chance.attend(q, scale=0.1, softcap=None).out - wanted).norm() / wanted.norm())


def test_on_the_pocket_model_principal_directions_beat_chance_at_a_quarter() -> None:
    for layer in pocket_layers(400)[2:6]:
        q, k, v = layer.q[:, :, -8:].double(), layer.k.double(), layer.v.double()
        wanted = attend(q, k, v, causal=False, scale=layer.scale).out
        bases = (principal(k), principal(v)), tuple((random_basis(2, 64, seed), principal(x)[1]) for seed, x in ((0, k), (1, v)))
        errors = []
        for key, value in bases:
            got = segment_of(k, v, key, value, [(16, 16)] * 2).attend(q, scale=layer.scale, softcap=None).out
            errors.append(float((got - wanted).norm() / wanted.norm()))
        assert errors[0] < 0.9 * errors[1]


# -- ranks -------------------------------------------------------------------------------------------------------------------


def test_the_error_table_is_the_weighted_error_of_the_output() -> None:
    q, k, v = (x[0] for x in low_rank())
    k, v = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    places, back = torch.tensor([299, 40, 120, 0, 7]), random_basis(2, 32, seed=3)
    weight = torch.rand(6, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    table = error_table(q * 0.2, k, v, weight, back, places, recent=10)
    visible = torch.arange(300) <= places.unsqueeze(1)
    near = torch.arange(300) > places.unsqueeze(1) - 10

    def out(level_k: int, level_v: int) -> Tensor:
        cut_q, cut_v = q.clone(), v.clone()
        cut_q[..., 4 * level_k :], cut_v[..., 4 * level_v :] = 0, 0
        logits = [0.2 * x.unflatten(0, (2, 3)) @ k.mT.unsqueeze(1) for x in (q, cut_q)]
        p = torch.where(near, *logits).masked_fill(~visible, -torch.inf).softmax(-1)
        return (p * near) @ (v @ back.mT).unsqueeze(1) + (p * ~near) @ (cut_v @ back.mT).unsqueeze(1)

    for a, b in ((8, 8), (3, 8), (8, 2), (1, 5)):
        wanted = (weight.unflatten(0, (2, 3)) * (out(a, b) - out(8, 8)) ** 2).sum((1, 2, 3))
        assert torch.allclose(table[:, a - 1, b - 1], wanted, atol=1e-12)


def test_samples_of_different_lengths_add_up() -> None:
    model, parts = llama(), [tokens(1, 90, seed=1), tokens(2, 40, seed=2)]
    both, first = (saccade.calibrate(model, "matryoshkakv", batches) for batches in (parts, parts[:1]))
    with torch.no_grad():
        keys = [run(model, ids, [ids.shape[1]])[1].layers[1].keys for ids in parts]
    rows = torch.cat([x.transpose(0, 1).flatten(1, 2) for x in keys], 1).double()
    assert torch.allclose(both.tensor(1, "key_mean").double(), rows.mean(1), atol=1e-5)
    assert not torch.allclose(both.tensor(1, "key_mean"), first.tensor(1, "key_mean"), atol=1e-3)
    basis = both.tensor(1, "key_basis").double()
    spread = basis.mT @ (rows - rows.mean(1, keepdim=True)).mT @ (rows - rows.mean(1, keepdim=True)) @ basis
    assert float((spread - torch.diag_embed(spread.diagonal(dim1=1, dim2=2))).abs().max()) < 1e-4 * float(spread.max())
    assert bool((spread.diagonal(dim1=1, dim2=2).diff(dim=-1) <= 1e-6).all())


def test_the_cheapest_eighth_goes_first_and_one_order_serves_every_budget() -> None:
    # two layers of one head; only values of the second layer cost something, more for each eighth
    cheap, dear = torch.zeros(1, 8, 8), torch.arange(7, -1, -1.0).square().expand(1, 8, 8).clone()
    first, second = greedy_shares([cheap, dear])
    assert levels_at(second, 0.35)[1].tolist() == [8] and levels_at(second, 0.34)[1].tolist() == [7]
    for budget in (0.125, 0.3, 0.5, 0.77, 1.0):
        total = int(levels_at(first, budget).sum() + levels_at(second, budget).sum())
        assert budget * 32 - 1 < total <= budget * 32 + 1e-3
    assert levels_at(even_shares(3), 0.4).tolist() == [[3] * 3] * 2 and levels_at(even_shares(3), 1.0).tolist() == [[8] * 3] * 2


def test_searched_ranks_lose_less_than_even_ones() -> None:
    """Heads of different need: at one budget the search gives coordinates to those that have use for them."""
    plan, method = plan_of(torch.float64), MatryoshkaKV(budget=0.5)
    model, ids = llama(torch.float64), tokens(2, 105)
    levels = [levels_at(torch.stack([plan.tensor(i, f"{name}_shares") for name in ("key", "value")]), 0.5) for i in range(2)]
    assert torch.stack(levels).unique().numel() > 1 and int(torch.stack(levels).sum()) == 32
    dense, _ = run(model, ids, [100, *[1] * 5])
    errors = []
    for spec in (method.spec, "matryoshkakv(budget=0.5, even=True)"):
        with saccade.attach(model, cache=spec, plan=plan):
            errors.append(float((run(model, ids, [100, *[1] * 5])[0] - dense)[:, 100:].norm()))
    assert errors[0] < errors[1]


# -- the policy --------------------------------------------------------------------------------------------------------------


def test_rotated_entries_are_those_of_the_plan_and_cost_their_ranks() -> None:
    model, ids = llama(torch.float64), tokens(2, 71)
    plan, method = plan_of(torch.float64), MatryoshkaKV(budget=0.5, recent=6)
    with saccade.attach(model, cache=method, plan=plan) as handle:
        got, held = run(model, ids, [70, 1])
        stats = handle.stats()
    _, plain = run(model, ids, [70])
    ranks = []
    for index, (own, layer) in enumerate(zip(plain.layers, held.layers, strict=True)):
        part = layer.segments[0].read(0, 64)
        assert part.side["positions"][0, 1].tolist() == list(range(64)) and layer.tail.n == 7
        for name, x, read in (("key", own.keys, part.keys), ("value", own.values, part.values)):
            basis, mean = plan.tensor(index, f"{name}_basis").double(), plan.tensor(index, f"{name}_mean").double().unsqueeze(1)
            level = levels_at(plan.tensor(index, f"{name}_shares"), 0.5)
            ranks.append(2 * level)
            for head in range(2):
                kept = basis[head, :, : 2 * int(level[head])]
                wanted = (x[:, head, :64] - mean[head]) @ kept @ kept.mT + mean[head]
                assert float((read[:, head] - wanted).abs().max()) < 1e-9
            x[:, :, :64] = read
    with torch.no_grad():
        wanted = model(ids[:, 70:], past_key_values=plain).logits
    assert float((got[:, 70:] - wanted).abs().max()) < 1e-9
    sealed = sum(layer.segments[0].kv_bytes for layer in held.layers)
    assert sealed == 2 * 64 * int(torch.stack(ranks).sum()) * 8 == stats.kv_bytes - sum(layer.tail.kv_bytes for layer in held.layers)
    assert sealed == 0.5 * 2 * 64 * 2 * 2 * 2 * 16 * 8


def test_everything_kept_is_dense() -> None:
    model, ids = llama(torch.float64), tokens(2, 70)
    dense, _ = run(model, ids, [60, *[1] * 10])
    for spec in ("matryoshkakv(budget=1.0, recent=2, interval=3)", "matryoshkakv(recent=100)"):
        with saccade.attach(model, cache=spec, plan=plan_of(torch.float64)):
            got, held = run(model, ids, [60, *[1] * 10])
        assert float((got - dense).abs().max()) < 1e-5  # the plan's bases are float32
        assert [s.length for s in held.layers[0].segments] == ([58, 3, 3, 3] if "interval" in spec else [])


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache=SHORT, plan=plan_of()) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        held = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=held)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=held)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2
        assert [s.length for s in held.layers[0].segments] == [76, 44, 8]
        held.crop(-60)
        assert held.layers[0].lengths() == [[75, 75]]


def test_after_an_eviction_policy_it_rotates_what_is_left() -> None:
    model, ids = llama(), tokens(2, 110)
    with saccade.attach(model, cache=f"snapkv(budget=40, window=8)|{SHORT}", plan=plan_of()):
        out, held = run(model, ids, [100, *[1] * 9])
        assert [s.length for s in held.layers[0].segments] == [36, 8] and bool(torch.isfinite(out).all())
        held.crop(-30)  # heads held different tokens: what is left of them differs in number
        assert bool(torch.isfinite(model(ids[:, :1], past_key_values=held).logits).all())


def test_fields_are_validated_and_unfit_models_refused() -> None:
    for wrong in ("budget=0.1", "budget=1.5", "recent=-1", "interval=0", "even=2"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"matryoshkakv({wrong})")
    with pytest.raises(ValueError, match="needs a calibration plan"):
        saccade.attach(llama(), cache="matryoshkakv")
    model = tiny("deepseek-v3")
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(model, cache="matryoshkakv", plan=plan_of())


def test_on_the_pocket_model_a_needle_is_found_in_three_quarters_of_the_coordinates() -> None:
    """In less with trained bases: see tests/train/test_bases.py."""
    model, _ = saccade.pocket(dtype=torch.float32)
    plan = saccade.calibrate(model, "matryoshkakv", [ids_of(grammar().haystack(Random(100), 511))])
    found, share = answered(*needle(1024, 0.4, seed=1), cache="matryoshkakv(budget=0.75)", plan=plan)
    assert found and share < 0.83


@pytest.mark.slow
def test_on_the_pocket_model_searched_ranks_diverge_less_than_even_ones() -> None:
    model, _ = saccade.pocket(dtype=torch.float32)
    text = [ids_of(grammar().haystack(Random(seed), 400)) for seed in (100, 101)]
    plan = saccade.calibrate(model, "matryoshkakv", text[:1])
    with torch.no_grad():
        exact = model(text[1]).logits.log_softmax(-1)[:, 301:]
    lost = []
    for even in (False, True):
        with saccade.attach(model, cache=f"matryoshkakv(budget=0.5, even={even}, interval=1000)", plan=plan), torch.no_grad():
            cache = model(text[1][:, :300]).past_key_values
            model(text[1][:, 300:301], past_key_values=cache)
            got = model(text[1][:, 301:], past_key_values=cache).logits.log_softmax(-1)
        lost.append(float((exact.exp() * (exact - got)).sum(-1).mean()))
    assert lost[0] < 0.5 * lost[1]
