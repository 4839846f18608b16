"""shadowkv: factors of all heads together, landmarks and outliers, fetched values, and what it finds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.contract.models import tiny
from tests.methods.decode.harness import needle, pocket, tensors
from tests.methods.decode.sealing import ROTARY, closed, on_host, rotated, told
from tests.methods.decode.stack import dense, over, worst
from torch import Tensor

import saccade
from saccade.cache.shadow import ShadowSegment, _turning
from saccade.core import Rotary
from saccade.evaluate.decoding import Outcome, run_sample
from saccade.evaluate.lineups import CACHE, filled
from saccade.evaluate.prompts import Codec, prompt_of
from saccade.evaluate.tasks import build
from saccade.evaluate.text import grammar
from saccade.methods.decode.shadowkv import ShadowKV
from saccade.parts.joint_rank import joint_factors
from saccade.parts.rotary import turn


def sealed(method: ShadowKV, q: Tensor, k: Tensor, v: Tensor, **more):
    ctx, slots = closed(method, q, k, v, **more)
    (segment,) = slots.sealed
    assert isinstance(segment, ShadowSegment)
    return ctx, slots, segment


def read_mask(method: ShadowKV, ctx, segment: ShadowSegment, q: Tensor, n: int) -> Tensor:
    """Which of n tokens a step reads, bool `(B, Hq, n)`, worked out from the landmarks it names."""
    picked = segment.content.chunks.gather(-1, method.landmarks(ctx, q, segment))
    ids = segment.tokens(torch.cat([picked, segment.content.exact_chunks], dim=-1))
    mask = torch.zeros(*ids.shape[:2], n, dtype=torch.bool).scatter(-1, ids, True)
    mask[..., segment.length :] = True
    return mask.repeat_interleave(q.shape[1] // ids.shape[1], 1)


# -- factors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotary", [ROTARY, None])
def test_full_rank_and_budget_equal_dense(rotary) -> None:
    q, k, v = rotated(2, 6, 2, 203)
    method = ShadowKV(rank=64, chunk=8, budget=1.0, outliers=3, local=2)
    ctx, slots, segment = sealed(method, q, k, v, rotary=rotary)
    assert segment.length == 184 and slots.length == 19
    assert worst(method.attend(ctx, q, slots.keys, slots.values), dense((q, k, v))) < 1e-6  # angles of rebuilt keys are float32
    assert worst(segment.read(0, 184).keys, k[:, :, :184]) < 1e-9
    assert worst(segment.read(13, 50).values, v[:, :, 13:50]) == 0


def test_keys_of_exact_rank_are_rebuilt() -> None:
    """12 directions over all heads: each head alone has rank 12 too, so only factors shared by the heads are this small."""
    g = torch.Generator().manual_seed(1)
    low = torch.randn(1, 160, 12, generator=g, dtype=torch.float64) @ torch.randn(12, 4 * 32, generator=g, dtype=torch.float64)
    k = turn(low.unflatten(-1, (4, 32)).transpose(1, 2), torch.arange(160), ROTARY)
    q, _, v = tensors(1, 8, 4, 160, 32)
    _, _, segment = sealed(ShadowKV(rank=12, outliers=2), q, k, v)
    assert worst(segment.read(0, segment.length).keys, k[:, :, : segment.length]) < 1e-9
    assert segment.content.factors.shape == (1, 1, 128, 12) and segment.content.basis.shape == (1, 4, 12, 32)
    _, _, short = sealed(ShadowKV(rank=11, outliers=0), q, k, v)
    assert worst(short.read(0, short.length).keys, k[:, :, : short.length]) > 0.1


def rank_error(keys: Tensor, rank: int) -> float:
    factors, basis = joint_factors(keys, rank)
    return float((factors @ basis - keys).norm() / keys.norm())


def test_keys_before_the_rotary_embedding_have_lower_rank() -> None:
    prompt = needle()
    inv_freq = 500000.0 ** (-torch.arange(32) / 32)
    errors = []
    for layer in prompt.layers[::3]:
        k = layer.k.double()
        k = k[:, :, :1024]
        before = turn(k, -torch.arange(k.shape[2]), replace(ROTARY, inv_freq=inv_freq))
        errors.append((rank_error(before, 32), rank_error(k, 32)))
    assert all(a < b for a, b in errors), errors
    assert sum(a for a, _ in errors) < 0.8 * sum(b for _, b in errors), errors
    g = torch.Generator().manual_seed(0)
    low = (torch.randn(1, 500, 10, generator=g) @ torch.randn(10, 64, generator=g)).unflatten(-1, (2, 32)).transpose(1, 2)
    low = low + 0.05 * torch.randn(low.shape, generator=g)
    assert rank_error(low, 10) < 0.03 < 0.3 < rank_error(turn(low, torch.arange(500), ROTARY), 10)


def test_factors_are_the_best_of_their_rank() -> None:
    keys = torch.randn(2, 3, 70, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors, basis = joint_factors(keys, 7)
    x = keys.transpose(1, 2).flatten(2)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    want = (u[..., :7] * s[:, None, :7]) @ vh[:, :7]
    assert worst((factors @ basis).transpose(1, 2).flatten(2), want) < 1e-10


# -- landmarks and outliers ------------------------------------------------------------------------------------------------


def test_a_step_reads_landmarks_outliers_and_the_end_in_one_softmax() -> None:
    q, k, v = rotated(2, 6, 2, 203)
    method = ShadowKV(rank=64, budget=40, outliers=3, local=2)
    pairs: list[float] = []
    ctx, slots, segment = sealed(method, q, k, v, pairs=pairs)
    mask = read_mask(method, ctx, segment, q, 203)
    assert torch.equal(mask.sum(-1), torch.full((2, 6), 40 + 24 + 19))
    assert worst(method.attend(ctx, q, slots.keys, slots.values), over((q, k, v), mask)) < 1e-6
    assert sum(pairs) == 83


@pytest.mark.parametrize("interleaved", [False, True])
def test_rebuilt_keys_are_turned_to_far_places(interleaved: bool) -> None:
    _, k, v = rotated(2, 6, 2, 203)
    _, _, segment = sealed(ShadowKV(rank=64, budget=40, outliers=3, local=2), k[:, :, -1:].repeat(1, 3, 1, 1), k, v)
    content = replace(segment.content, begin=1_000_003, rotary=Rotary(ROTARY.inv_freq, interleaved))
    chunks = content.chunks[:, :, 2:6]
    tokens = segment.tokens(chunks)
    given = _turning(content, chunks, tokens)
    if interleaved:
        assert given["rotary"] is content.rotary and torch.equal(given["positions"], tokens + 1_000_003)
        return
    # a float32 angle of that size is off by more than a hundredth
    angles = (tokens + 1_000_003).double().unsqueeze(-1) * ROTARY.inv_freq.double()
    for got, want in zip(given["rotary"], (angles.cos(), angles.sin()), strict=True):
        assert got.shape == want.shape and float((got - want).abs().max()) < 1e-6


def test_landmarks_are_means_and_the_group_takes_the_highest_share() -> None:
    q, k, v = rotated(1, 6, 2, 132)
    method = ShadowKV(rank=64, chunk=4, budget=20, outliers=0, local=1)
    ctx, _, segment = sealed(method, q, k, v)
    means = k[:, :, :128].unflatten(2, (32, 4)).mean(3)
    assert worst(segment.content.landmarks, means) < 1e-12
    shares = (q.squeeze(2).unflatten(1, (2, 3)) @ means.mT * 32**-0.5).softmax(-1).amax(2)
    assert torch.equal(method.landmarks(ctx, q, segment), shares.topk(5).indices.sort(-1).values)


def odd_keys() -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Chunks of 8 like keys; four of them hold one key that points the other way, at which the query looks."""
    g = torch.Generator().manual_seed(4)
    centres = torch.randn(1, 1, 100, 1, 32, generator=g, dtype=torch.float64)
    k = (centres + 0.1 * torch.randn(1, 1, 100, 8, 32, generator=g, dtype=torch.float64)).flatten(2, 3)
    q = torch.randn(1, 2, 1, 32, generator=g, dtype=torch.float64)
    q[:, 1] = q[:, 0]
    places = [8 * 7 + 3, 8 * 30, 8 * 55 + 7, 8 * 81 + 4]
    for place in places:
        chunk = slice(place // 8 * 8, place // 8 * 8 + 8)
        k[:, :, chunk] -= 2 * q[:, :1] / q[:, :1].norm()
        k[:, :, place] = 8 * q[:, 0, 0] / q[:, 0, 0].norm()
    return q, k, torch.randn(1, 1, 800, 32, generator=g, dtype=torch.float64), places


def test_outlier_chunks_raise_recall() -> None:
    """At an equal number of tokens read: what a mean does not show is found because its chunk is kept exactly."""
    q, k, v, places = odd_keys()
    found = {}
    for outliers, budget in ((0, 96), (6, 48)):
        method = ShadowKV(rank=32, budget=budget, outliers=outliers)
        ctx, slots, segment = sealed(method, q, k, v, rotary=None)
        mask = read_mask(method, ctx, segment, q, 800)
        assert int(mask[0, 0].sum()) == 96 + 32
        found[outliers] = int(mask[0, 0, places].sum()), worst(method.attend(ctx, q, slots.keys, slots.values), dense((q, k, v)))
    assert found[6][0] == 4 and found[0][0] <= 1
    assert found[6][1] < 0.1 * found[0][1]
    worst_match = F.cosine_similarity(k.unflatten(2, (100, 8)), k.unflatten(2, (100, 8)).mean(3, keepdim=True), dim=-1).amin(-1)
    _, _, segment = sealed(ShadowKV(rank=32, outliers=6), q, k, v, rotary=None)
    assert torch.equal(segment.content.exact_chunks, worst_match[..., :96].topk(6, largest=False).indices.sort(-1).values)


# -- storage ---------------------------------------------------------------------------------------------------------------


def test_chunks_of_the_step_before_are_not_fetched_again() -> None:
    q, k, v = rotated(1, 4, 2, 400)
    method = ShadowKV(rank=64, budget=80, outliers=0)
    ctx, slots, segment = sealed(method, q, k, v)
    first = method.attend(ctx, q, slots.keys, slots.values)
    recent = ctx.state["recent 0"]
    assert recent.loaded == 20
    assert torch.equal(method.attend(ctx, q, slots.keys, slots.values), first) and recent.loaded == 20
    near = q + 0.3 * torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=q.dtype)
    kept = method.landmarks(ctx, q, segment)
    new = method.landmarks(ctx, near, segment)
    fresh = int((new.unsqueeze(-1) != kept.unsqueeze(-2)).all(-1).sum())
    assert 0 < fresh < 20
    out = method.attend(ctx, near, slots.keys, slots.values)
    assert recent.loaded == 20 + fresh
    assert worst(out, over((near, k, v), read_mask(method, ctx, segment, near, 400))) < 1e-6


def test_bytes_on_the_device_fall_and_values_are_on_the_host() -> None:
    q, k, v = rotated(1, 8, 4, 2000)
    _, _, segment = sealed(ShadowKV(rank=20, outliers=10), q, k, v)
    n = segment.length
    assert n == 1968 and segment.host_bytes == v[:, :, :n].numel() * 8
    # a factor row for all heads against a key and a value of 32 channels for each
    assert segment.kv_bytes == 8 * (n * 20 + 4 * 20 * 32 + 2 * 4 * 10 * 8 * 32)
    assert segment.kv_bytes < 0.2 * (k.numel() + v.numel()) * 8


def test_taking_back_part_of_a_sealed_prompt_keeps_the_rest() -> None:
    q, k, v = rotated(1, 4, 2, 200)
    method = ShadowKV(rank=64, budget=0.25, outliers=3)
    ctx, _, segment = sealed(method, q, k, v)
    left = segment.before(101)
    assert left.length == 101 and segment.before(500) is segment and segment.before(0).length == 0
    ctx.segments = [left]
    assert worst(method.attend(ctx, q, k[:, :, :0], v[:, :, :0]), dense((q, k[:, :, :101], v[:, :, :101]))) < 1e-9


def test_needle_is_found_with_a_tenth_of_the_tokens_fetched() -> None:
    prompt = needle()
    text, stats, cache = told(prompt, decode="shadowkv(rank=64, budget=0.1, outliers=8)")
    assert text == prompt.answer
    dense_bytes = 8 * 2 * 2 * 64 * 4 * prompt.ids.shape[1]
    assert stats.decode_density is not None and stats.decode_density < 0.2
    assert stats.kv_bytes < 0.4 * dense_bytes and on_host(cache) > 0.45 * dense_bytes


@pytest.mark.slow
def test_the_table_setting_reads_every_digit_at_a_quarter_of_the_cache() -> None:
    """Of 8 bytes with most of a number the mean says so little that the chunk ranks below a quarter of the others."""
    codec = Codec(saccade.pocket(torch.float32, "cpu")[1])
    prompt = prompt_of(build("needle"), codec, grammar(), length=2048, seed=0, index=3)

    def asked(spec: str) -> Outcome:
        with saccade.attach(pocket(), decode=spec) as handle:
            return run_sample(pocket(), codec, prompt, "aware", handle)

    found = asked(filled(CACHE["shadowkv"]["0.25"], 2048))
    assert found.score == 1
    # of so short a prompt the basis and the newest chunks are 0.02
    assert found.decode_density is not None and found.decode_density < 0.265
    assert found.kv_bytes < 0.265 * 8 * 2 * 2 * 64 * 4 * 2048
    assert asked("shadowkv(rank=64, budget=0.25, outliers=8)").score == 0


@pytest.mark.slow
def test_a_single_chunk_for_each_head_is_not_enough_for_the_needle() -> None:
    prompt = needle()
    assert told(prompt, decode="shadowkv(rank=64, budget=8, outliers=0)")[0] != prompt.answer


def test_a_saved_cache_goes_on(tmp_path: Path) -> None:
    model, ids = tiny("llama"), torch.randint(3, 60, (2, 70), generator=torch.Generator().manual_seed(0))
    spec = "shadowkv(rank=8, chunk=4, budget=16, outliers=2, local=2)"
    with saccade.attach(model, decode=spec) as handle, torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        model(ids[:, 60:61], past_key_values=cache)
        handle.save(tmp_path / "a.cache")
        want = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(61, 70)]
    with saccade.attach(model, decode=spec), torch.no_grad():
        cache = saccade.load_cache(tmp_path / "a.cache", model)
        for i in range(61, 70):
            assert torch.equal(model(ids[:, i : i + 1], past_key_values=cache).logits, want[i - 61])


@pytest.mark.parametrize("fields", ["rank=0", "chunk=0", "budget=12", "outliers=-1", "local=True"])
def test_fields_out_of_range_are_refused(fields: str) -> None:
    with pytest.raises(ValueError, match="shadowkv"):
        saccade.methods.build(f"shadowkv({fields})")
