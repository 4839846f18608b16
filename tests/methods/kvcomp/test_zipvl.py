"""ZipVL: how many tokens matter and which, the prefill that reads only those, and the cache that stores them in more bits."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.kvcomp.stage import OPTIONS, answered, generate, llama, needle, run, tokens
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import capture
from saccade.methods.kvcomp import zipvl
from saccade.methods.kvcomp.zipvl import ZipVL, choose_tokens, important
from saccade.ops import attend
from saccade.ops.estimate import last_estimate
from saccade.parts.fixed_probes import FixedProbes
from saccade.parts.saliency import column_mass

FIELDS = "tau=0.8, recent=4, drawn=8, interval=8"
SHORT = f"zipvl({FIELDS})"


def qkv(n: int, seed: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, h, n, 16, generator=generator, dtype=torch.float64) for h in (6, 2, 2))  # pyright: ignore


def chosen_by(method: ZipVL, q: Tensor, k: Tensor, layer: int = 0) -> Tensor:
    """The important tokens of a whole prompt, bool `(B, n)`."""
    probes = FixedProbes(method.recent, method.drawn, layer)
    probes.add(q, k.shape[2])
    rows, slots = probes.rows(k.shape[2], k.shape[2])
    return important(rows, slots, k, tau=method.tau, recent=method.recent, scale=k.shape[-1] ** -0.5)


# -- how many tokens, and which ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 40, 1000])
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.975, 1.0])
def test_uniform_attention_needs_the_share_tau_of_the_tokens(n: int, tau: float) -> None:
    q, k = torch.zeros(1, 6, 1, 16), torch.randn(1, 2, n, 16)
    count = int(important(q, torch.tensor([n - 1]), k, tau=tau, recent=1, scale=1.0).sum())
    assert count == math.ceil(round(tau * n, 9))


def test_a_layer_that_looks_at_one_token_needs_one() -> None:
    mass = torch.zeros(1, 500)
    mass[0, 123] = 64.0
    slots = torch.arange(436, 500)
    assert choose_tokens(mass, slots, tau=0.975, recent=0).nonzero().tolist() == [[0, 123]]
    assert int(choose_tokens(mass, slots, tau=0.975, recent=64).sum()) == 64  # the latest tokens at least
    ratios = [int(choose_tokens(x, slots, tau=0.975, recent=1).sum()) / 500 for x in (mass, torch.ones(1, 500))]
    assert ratios[0] < 0.01 and ratios[1] == pytest.approx(0.976, abs=1e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_sums_of_one_kernel_choose_the_same(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU no probability is written."""
    q, k = (x.float() for x in qkv(90, batch=2)[:2])
    slots, found = torch.arange(50, 90, 3), []
    for fast in (False, True):
        monkeypatch.setattr(zipvl, "runs_on", lambda _, fast=fast: fast)
        found.append(important(q[:, :, slots], slots, k, tau=0.8, recent=4, scale=0.25, softcap=softcap))
        assert not fast or last_estimate().op == "row_sums"
    assert torch.equal(*found) and not found[0].all()


def test_the_count_grows_with_tau() -> None:
    q, k, _ = qkv(300)
    counts = [int(chosen_by(ZipVL(tau=tau), q * 3, k).sum()) for tau in (0.3, 0.6, 0.9, 0.975, 0.999, 1.0)]
    assert counts == sorted(counts) and counts[0] < 150 and counts[-1] == 300


def test_the_count_is_of_plain_mass_and_the_choice_of_mass_per_row() -> None:
    slots = torch.tensor([3, 4, 5])
    mass = torch.tensor([[0.3, 0.9, 0.9, 0.3, 0.0, 0.6]])  # each of the last two is seen by fewer rows: 2 and 1
    got = choose_tokens(mass, slots, tau=0.5, recent=0)
    # 0.9 + 0.9 cover half of 3.0; per row the best are 0.6 / 1 and 0.9 / 3
    assert got[0].tolist() == [False, True, False, False, False, True]


def test_late_salient_tokens_are_found_by_mass_per_row_and_not_by_plain_mass() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 1024
    q, k = torch.randn(1, 4, n, 64, generator=generator), torch.randn(1, 2, n, 64, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    planted = torch.randperm(n // 2 - 80, generator=generator)[:20] + n // 2
    k[:, :, planted] += direction * 6
    q += direction * 4
    rows = torch.arange(n)
    mass = column_mass(q, rows, k, scale=0.125).sum(1)
    per_row = mass / (n - torch.arange(n))
    recall = [float(torch.isin(x[0, : n - 16].topk(20).indices, planted).double().mean()) for x in (per_row, mass)]
    assert recall[0] >= 0.8 and recall[1] <= 0.65


# -- prefill -----------------------------------------------------------------------------------------------------------------


def test_important_rows_attend_among_themselves_and_the_others_give_zero() -> None:
    q, k, v = qkv(90, batch=2)
    method = ZipVL(tau=0.7, recent=5, drawn=10)
    out = saccade.attention(q, k, v, method=method)
    chosen = chosen_by(method, q, k)
    assert chosen[:, -5:].all() and not torch.equal(chosen[0], chosen[1])
    for b in range(2):
        mine = chosen[b].nonzero().squeeze(-1)
        scores = (q[b, :, mine].unflatten(0, (2, 3)) @ k[b, :, mine].mT.unsqueeze(1)) / 4
        scores = scores.masked_fill(mine[None, :] > mine[:, None], -torch.inf)
        wanted = (torch.softmax(scores, -1) @ v[b, :, mine].unsqueeze(1)).flatten(0, 1)
        assert float((out[b, :, mine] - wanted).abs().max()) < 1e-9
        assert float(out[b, :, ~chosen[b]].abs().max()) == 0


def test_with_all_the_mass_prefill_is_dense_attention() -> None:
    q, k, v = qkv(70)
    assert torch.equal(saccade.attention(q, k, v, method="zipvl(tau=1.0)"), attend(q, k, v).out)


def test_a_later_turn_reads_what_matters_of_the_earlier_one() -> None:
    model, ids = llama(torch.float64), tokens(2, 130)
    with saccade.attach(model, prefill=f"zipvl({FIELDS.replace('0.8', '1.0')})"):
        opened, _ = run(model, ids, [70, 50, *[1] * 10])
    dense, _ = run(model, ids, [70, 50, *[1] * 10])
    assert float((opened - dense).abs().max()) < 1e-9
    with saccade.attach(model, prefill=SHORT) as handle:
        sparse, _ = run(model, ids, [70, 50, *[1] * 10])
        density = handle.stats().prefill_density
    assert bool(torch.isfinite(sparse).all()) and density is not None and density < 0.95


def test_work_is_counted() -> None:
    model, ids = llama(torch.float64), tokens(1, 200)
    with torch.no_grad(), capture(model) as layers:
        model(ids)
    first = chosen_by(ZipVL(tau=0.8, recent=4, drawn=8), layers[0].q, layers[0].k)
    with saccade.attach(model, prefill=SHORT) as handle:
        run(model, ids, [200])
        found = handle.stats().per_layer[0]["prefill_density"]
    m = int(first.sum())
    probes = FixedProbes(4, 8, 0)
    probes.add(layers[0].q, 200)
    work = m * (m + 1) / 2 + float((probes.rows(200, 200)[1] + 1).sum())
    assert found == pytest.approx(work / (200 * 201 / 2)) and found < 0.8


# -- the cache ---------------------------------------------------------------------------------------------------------------


def test_prefill_and_cache_make_the_same_choice_in_the_first_layer() -> None:
    model, ids = llama(torch.float64), tokens(2, 101)
    with torch.no_grad(), capture(model) as layers:
        model(ids[:, :100])
    chosen = chosen_by(ZipVL(tau=0.8, recent=4, drawn=8), layers[0].q, layers[0].k)
    with saccade.attach(model, prefill=SHORT, cache=SHORT) as handle:
        _, cache = run(model, ids, [100, 1])
        assert handle.stats().per_layer[0]["prefill_density"] < 0.8
    fine, coarse = cache.layers[0].segments[0].parts
    assert fine.keys.packed.bits == 4 and coarse.keys.packed.bits == 2
    for b in range(2):
        count = int(chosen[b].sum())
        assert fine.counts[b].tolist() == [count] * 2 and coarse.counts[b].tolist() == [100 - count] * 2
        assert fine.positions[b, 0, :count].tolist() == chosen[b].nonzero().squeeze(-1).tolist()


@pytest.mark.parametrize("high", [4, 16])
def test_the_rest_may_be_dropped(high: int) -> None:
    model, ids = llama(torch.float64), tokens(2, 103)
    with saccade.attach(model, cache=f"zipvl({FIELDS}, rest='drop', high_bits={high})") as handle:
        got, cache = run(model, ids, [100, 1, 1, 1])
        kept = handle.stats().kept
    with torch.no_grad(), capture(model) as layers:
        model(ids[:, :100])
    chosen = chosen_by(ZipVL(tau=0.8, recent=4, drawn=8), layers[0].q, layers[0].k)
    assert cache.layers[0].lengths() == [[int(row.sum()) + 3] * 2 for row in chosen] and len(kept) == 2
    # what a batch gives is what its rows give alone
    for b in range(2):
        with saccade.attach(model, cache=f"zipvl({FIELDS}, rest='drop', high_bits={high})"):
            alone, _ = run(model, ids[b : b + 1], [100, 1, 1, 1])
        assert float((got[b] - alone[0]).abs().max()) < 1e-9


def test_the_fused_reader_gives_what_the_decoded_entries_give() -> None:
    model, ids = llama(torch.float64), tokens(2, 101)
    with saccade.attach(model, cache=SHORT):
        _, cache = run(model, ids, [100, 1])
    segment = cache.layers[1].segments[0]
    part = segment.read(0, 100)
    assert part.valid is None and part.side["positions"][1, 1].tolist() == list(range(100))
    for m in (1, 20):
        q = torch.randn(2, 6, m, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
        wanted = attend(q, part.keys, part.values, causal=False, scale=0.3, return_lse=True)
        got = segment.attend(q, scale=0.3, softcap=None)
        assert float((got.out - wanted.out).abs().max()) < 1e-9 and float((got.lse - wanted.lse).abs().max()) < 1e-9


def test_decoding_encodes_an_interval_at_a_time() -> None:
    model, ids = llama(), tokens(1, 90)
    with saccade.attach(model, cache=SHORT):
        _, cache = run(model, ids, [70, *[1] * 20])
    assert [s.length for s in cache.layers[0].segments] == [70, 8, 8]


def test_sixteen_bits_are_lossless_and_chunks_change_nothing() -> None:
    model, ids = llama(torch.float64), tokens(2, 110)
    dense, _ = run(model, ids, [100, *[1] * 10])
    with saccade.attach(model, cache=f"zipvl({FIELDS}, high_bits=16, low_bits=16)"):
        assert float((run(model, ids, [100, *[1] * 10])[0] - dense).abs().max()) < 1e-9
    with saccade.attach(model, cache=SHORT):
        whole, _ = run(model, ids, [100, *[1] * 10])
        parts, _ = run(model, ids, [3, 50, 16, 31, *[1] * 10])
    assert float((whole - parts).abs().max()) < 1e-6


def test_generation_with_beams_prompt_lookup_and_a_second_turn() -> None:
    model, ids = llama(), tokens(1, 20).repeat(1, 4)
    with saccade.attach(model, prefill=SHORT, cache=SHORT) as handle:
        for options in OPTIONS.values():
            assert generate(model, ids, 10, **options).shape == (1, 90)
        cache = DynamicCache(config=model.config)
        first = generate(model, ids, 4, past_key_values=cache)
        second = generate(model, torch.cat([first, tokens(1, 40, seed=3)], 1), 12, past_key_values=cache)
        assert handle.stats().kept == [[second.shape[1] - 1] * 2] * 2
        cache.crop(-60)
        assert cache.layers[0].lengths() == [[75, 75]]


def test_fields_are_validated_and_unfit_models_refused() -> None:
    for wrong in ("tau=0", "tau=1.5", "recent=0", "drawn=-1", "interval=0", "high_bits=5", "low_bits=0", "rest='keep'"):
        with pytest.raises(ValueError, match=wrong.split("=")[0]):
            saccade.attach(llama(), cache=f"zipvl({wrong})")
    with pytest.raises(ValueError, match="latent"):
        saccade.attach(tiny("deepseek-v3"), cache="zipvl")


# -- on the pocket model -----------------------------------------------------------------------------------------------------


def test_on_the_pocket_model_a_needle_is_found_in_a_fifth_of_the_bytes() -> None:
    ids, value = needle(1024, 0.4, seed=1)
    found, share = answered(ids, value, cache="zipvl")
    assert found and share < 0.2  # of 32 bits; 4 and 2 bits, the parameters, and the tail's room
