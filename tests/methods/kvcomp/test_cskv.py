"""CSKV: what factors lose, that codes made of keys are those made of the layer's input, and a cache of codes with an exact window."""

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
from saccade.cache.factored import FactoredSegment, Maps
from saccade.core import Plan, Rotary, merge
from saccade.evaluate.text import grammar
from saccade.methods.kvcomp.cskv import CSKV
from saccade.ops import attend
from saccade.parts.factors import Factors, asvd_factors, beside, joint_rank, principal_factors
from saccade.parts.rotary import turn

ROTARY = Rotary(10000.0 ** (-torch.arange(8) / 8))
SHORT = CSKV(window=4)


@cache
def plan_of(method: CSKV, dtype: torch.dtype = torch.float32) -> Plan:
    return saccade.calibrate(llama(dtype), method, [tokens(2, 96, seed=9), tokens(1, 96, seed=10)])


def projection(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs `(400, 48)` of uneven channel sizes, and a weight `(48, 32)`; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, 48, dtype=torch.float64, generator=generator)
    x = x * (1.5 * torch.randn(48, dtype=torch.float64, generator=generator)).exp()
    return x, torch.randn(48, 32, dtype=torch.float64, generator=generator)


def lost(y: Tensor, factors: Factors) -> float:
    return float((y - y @ factors.down.double() @ factors.up.double()).norm())


# -- the factors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asvd_beats_svd_and_training_beats_both(seed: int) -> None:
    x, weight = projection(seed)
    y, size = x @ weight, x.abs().mean(0)
    plain, scaled = (asvd_factors(weight, size, 16, alpha) for alpha in (0.0, 0.5))
    down, up = (part.double().requires_grad_() for part in scaled)
    optimizer = torch.optim.AdamW([down, up], lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (y @ down @ up - y).square().mean()
        loss.backward()
        optimizer.step()
    trained, best = Factors(down.detach(), up.detach()), principal_factors(y.mT @ y, 16)
    assert lost(y, scaled) < 0.95 * lost(y, plain)
    assert lost(y, trained) < 0.99 * lost(y, scaled)
    # where training leads: no factors of this rank lose less
    assert lost(y, best) <= lost(y, trained)


def test_codes_of_keys_are_codes_of_the_input() -> None:
    """c = x A = y E with the paper's A = S^-1 U_r Sig_r^0.5, and B = Sig_r^0.5 V_r^T."""
    x, weight = projection()
    size = x.abs().mean(0)
    factors = asvd_factors(weight, size, 12)
    scale = (size + 1e-6).sqrt()
    left, values, right = torch.linalg.svd(scale.unsqueeze(1) * weight, full_matrices=False)
    paper = (left[:, :12] / scale.unsqueeze(1)) * values[:12].sqrt()
    codes, wanted = x @ weight @ factors.down.double(), x @ paper
    restored = wanted @ (values[:12].sqrt().unsqueeze(1) * right[:12])
    assert float((codes @ factors.up.double() - restored).abs().max()) < 1e-5 * float(restored.abs().max())
    signs = (codes * wanted).sum(0).sign()  # singular vectors have none
    assert float((codes - wanted * signs).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_full_rank_loses_nothing_and_too_low_a_density_is_refused() -> None:
    x, weight = projection()
    weight[:, 5] = weight[:, 4]  # a direction less than channels
    y = x @ weight
    for factors in (asvd_factors(weight, x.abs().mean(0), 32), principal_factors(y.mT @ y, 32)):
        assert lost(y, factors) < 1e-5 * float(y.norm())
    assert joint_rank(0.5, 64, 2) == 64 and joint_rank(0.3, 10, 3) == 9
    with pytest.raises(ValueError, match="give at least"):
        joint_rank(0.05, 16, 2)


# -- the segment -------------------------------------------------------------------------------------------------------------


def entries(n: int = 90, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 2, n, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    return keys, values, torch.arange(n) + 7


def maps(rank: int, seed: int, offset: bool = False) -> Maps:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator)).Q[:, :rank]
    shift = torch.randn(32, dtype=torch.float64, generator=generator) if offset else torch.zeros(32)
    return Maps.of(basis, basis.mT, shift, 2)


def segment_of(rank: tuple[int, int], rotary: Rotary | None, *, offset: bool = False, bits: int | None = None) -> FactoredSegment:
    keys, values, places = entries()
    return FactoredSegment.encode(
        keys, values, torch.arange(90, dtype=torch.int32).expand(2, 2, 90), maps(rank[0], 1, offset), maps(rank[1], 2, offset),
        rotary=rotary, places=places.expand(2, 2, 90), bits=bits, block=32,
    )  # fmt: skip


@pytest.mark.parametrize("rotary", [None, ROTARY], ids=["plain", "rotary"])
@pytest.mark.parametrize("offset", [False, True], ids=["", "offset"])
def test_all_ranks_are_full_attention_beside_other_entries(rotary: Rotary | None, offset: bool) -> None:
    keys, values, _ = entries()
    segment = segment_of((32, 32), rotary, offset=offset)
    for m in (1, 20):
        q = torch.randn(2, 6, m, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        tail = attend(q, keys[:, :, :9], values[:, :, :9], causal=False, scale=0.3, softcap=5.0, return_lse=True)
        both = (torch.cat([x, x[:, :, :9]], 2) for x in (keys, values))
        wanted = attend(q, *both, causal=False, scale=0.3, softcap=5.0, return_lse=True)
        got = merge(segment.attend(q, scale=0.3, softcap=5.0), tail)
        assert float((got.out - wanted.out).abs().max()) < 1e-6 and float((got.lse - wanted.lse).abs().max()) < 1e-6


@pytest.mark.parametrize("bits", [None, 4])
def test_a_segment_attends_over_what_it_restores(bits: int | None) -> None:
    keys, _, places = entries()
    segment = segment_of((12, 20), ROTARY, bits=bits)
    part = segment.read(0, 90)
    basis, plain = maps(12, 1).down, beside(turn(keys, -places, ROTARY))
    wanted = turn((plain @ basis @ basis.mT).unflatten(2, (2, 16)).transpose(1, 2), places, ROTARY)
    error = float((part.keys - wanted).norm() / wanted.norm())
    assert error < 1e-6 if bits is None else 0.01 < error < 0.15
    q = torch.randn(2, 6, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = attend(q, part.keys, part.values, causal=False, scale=0.3, return_lse=True)
    got = segment.attend(q, scale=0.3, softcap=None)
    assert float((got.out - exact.out).abs().max()) < 1e-6 and float((got.lse - exact.lse).abs().max()) < 1e-6
    rows = torch.tensor([1, 0, 1])
    assert torch.equal(segment.take_rows(rows).attend(q[rows], scale=0.3, softcap=None).out, got.out[rows])
    exact = attend(q, part.keys[:, :, :41], part.values[:, :, :41], causal=False, scale=0.3)
    assert float((segment.before(41).attend(q, scale=0.3, softcap=None).out - exact.out).abs().max()) < 1e-6
    if bits is None:
        assert segment.kv_bytes == 2 * 90 * (12 + 20) * 8
    else:
        # keys: 12 codes of 4 bits, a scale and zero for each in 3 blocks; values: 20 codes, scale and zero for each 10
        assert segment.kv_bytes == 2 * (90 * 6 + 3 * 12 * 16 + 90 * 10 + 90 * 2 * 16)


# -- the policy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [CSKV(key_density=1.0, value_density=1.0, window=3), CSKV(window=70)], ids=lambda m: m.spec)
def test_full_density_and_a_window_over_everything_are_dense(method: CSKV) -> None:
    model, ids = llama(torch.float64), tokens(2, 70)
    dense, _ = run(model, ids, [60, *[1] * 10])
    with saccade.attach(model, cache=method, plan=plan_of(method, torch.float64)):
        got, held = run(model, ids, [60, *[1] * 10])
    assert float((got - dense).abs().max()) < (1e-5 if method.window == 3 else 1e-9)  # the plan's factors are float32
    assert [s.length for s in held.layers[0].segments] == ([57, 3, 3, 3] if method.window == 3 else [])


def test_higher_densities_lose_less_and_the_last_window_stays() -> None:
    model, ids = llama(torch.float64), tokens(2, 105)
    dense, plain = run(model, ids, [100, *[1] * 5])
    errors = []
    for density in (0.25, 0.5, 0.75, 1.0):
        method = CSKV(key_density=density, value_density=density, window=10)
        with saccade.attach(model, cache=method, plan=plan_of(method, torch.float64)):
            got, held = run(model, ids, [100, *[1] * 5])
        errors.append(float((got - dense)[:, 100:].norm()))
        first = held.layers[0]
        assert first.segments[0].length == 90 and first.tail.n == 15
        assert torch.equal(first.tail.keys, plain.layers[0].keys[:, :, 90:])
        assert first.segments[0].kv_bytes == 2 * 90 * 2 * int(2 * 16 * density) * 8
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, cache=SHORT, plan=plan_of(SHORT)) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        held = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=held)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=held)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2
        assert [s.length for s in held.layers[0].segments] == [76, 44, 4, 4]
        held.crop(-60)
        assert held.layers[0].lengths() == [[75, 75]]


def test_after_an_eviction_policy_it_codes_what_is_left() -> None:
    model, ids = llama(), tokens(2, 110)
    with saccade.attach(model, cache=f"snapkv(budget=40, window=8)|{SHORT.spec}", plan=plan_of(SHORT)):
        out, held = run(model, ids, [100, *[1] * 9])
        assert [s.length for s in held.layers[0].segments] == [36, 4, 4] and bool(torch.isfinite(out).all())
        held.crop(-30)  # heads held different tokens: what is left of them differs in number
        assert bool(torch.isfinite(model(ids[:, :1], past_key_values=held).logits).all())


def test_fields_are_validated_and_unfit_plans_refused() -> None:
    for wrong in ("key_density=0", "value_density=1.5", "window=0", "bits=5"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"cskv({wrong})")
    with pytest.raises(ValueError, match="needs a calibration plan"):
        saccade.attach(llama(), cache="cskv")
    refused = pytest.raises(ValueError, match=r"calibrate again for value_density=0\.25")
    with saccade.attach(llama(), cache="cskv(value_density=0.25)", plan=plan_of(SHORT)), refused:
        run(llama(), tokens(1, 60), [59, 1])
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(tiny("deepseek-v3"), cache="cskv", plan=plan_of(SHORT))


# -- on the pocket model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "most"), [("cskv(key_density=0.4, value_density=0.4)", 0.48), ("cskv(bits=4)", 0.2)])
def test_on_the_pocket_model_a_needle_is_found_at_half_the_bytes(spec: str, most: float) -> None:
    model, _ = saccade.pocket(dtype=torch.float32)
    plan = saccade.calibrate(model, spec, [ids_of(grammar().haystack(Random(100), 511))])
    found, share = answered(*needle(1024, 0.4, seed=1), cache=spec, plan=plan)
    assert found and share < most
