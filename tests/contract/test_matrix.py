"""The matrix that every method enters by being registered. A cell is left out only with a reason in its Info."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import saccade
from saccade.core import Prefill
from saccade.methods import build
from tests.contract.harness import (
    METHODS,
    SAME,
    attached,
    copied,
    dense_logits,
    error,
    greedy,
    info,
    llama,
    logits,
    opened,
    plan,
    rounding,
    sparse,
    tokens,
)
from tests.contract.models import DEVICE, tiny

ALL = sorted(METHODS)
N, STEPS = 77, 5  # prompt and single steps: no multiple of any tile


def phase_of(slug: str) -> str:
    return info(slug).phase


def without(axis: str) -> list[str]:
    """Methods that do not opt out of an axis."""
    return [slug for slug in ALL if axis not in info(slug).opts_out]


def test_opting_out_needs_a_reason() -> None:
    for slug in ALL:
        for axis, reason in info(slug).opts_out.items():
            assert axis in ("chunked", "stepwise", "future"), f"{slug} opts out of {axis}, which no method may"
            assert len(reason) > 20, f"{slug} gives no reason for opting out of {axis}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slug", ALL)
def test_opened_equals_dense(slug: str, dtype: torch.dtype) -> None:
    exact = dense_logits("llama", torch.float64, 2, N + STEPS, STEPS)
    with attached(opened(slug), dtype=dtype):
        got = logits(tiny("llama", dtype), tokens(2, N + STEPS), steps=STEPS)
    assert error(got, exact) <= rounding("llama", dtype, 2, N + STEPS, STEPS)


@pytest.mark.parametrize("slug", ALL)
def test_sparse_is_sparse(slug: str) -> None:
    ids = tokens(1, 200 + STEPS)
    with saccade.attach(llama()) as handle:
        dense = logits(llama(), ids, steps=STEPS)
        full = handle.stats()
    with attached(sparse(slug)) as handle:
        got = logits(llama(), ids, steps=STEPS)
        stats = handle.stats()
    if phase_of(slug) == "prefill":
        assert stats.prefill_density is not None and stats.prefill_density < 0.9
    elif phase_of(slug) == "decode":
        assert stats.decode_density is not None and stats.decode_density < 0.9
    if info(slug).frees_memory:
        assert stats.kv_bytes < 0.9 * full.kv_bytes
    assert torch.isfinite(got).all()
    assert error(got, dense) > 1e-5, "a method that changes nothing has not been measured"


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
@pytest.mark.parametrize("slug", ALL)
def test_padding(slug: str, side: str) -> None:
    """A padded row gives what the same row gives alone."""
    model, pad = llama(), 13
    ids, short = tokens(2, N), tokens(1, N - pad, seed=5)
    gap = torch.zeros(1, pad, dtype=torch.long, device=DEVICE)
    batch = torch.cat([ids[:1], torch.cat([gap, short] if side == "left" else [short, gap], 1)])
    mask = torch.ones(2, N, dtype=torch.long, device=DEVICE)
    real = slice(pad, None) if side == "left" else slice(0, N - pad)
    mask[1] = 0
    mask[1, real] = 1
    steps = tokens(2, STEPS, seed=6)
    whole, mask = torch.cat([batch, steps], 1), torch.cat([mask, torch.ones(2, STEPS, dtype=torch.long, device=DEVICE)], 1)
    with attached(sparse(slug)):
        both = logits(model, whole, steps=STEPS, mask=mask)
        first = logits(model, whole[:1], steps=STEPS)
        second = logits(model, torch.cat([short, steps[1:]], 1), steps=STEPS)
    assert torch.isfinite(both).all()
    assert error(both[:1], first) < SAME
    assert error(torch.cat([both[1:, :N][:, real], both[1:, N:]], 1), second) < SAME


@pytest.mark.parametrize("slug", ALL)
def test_batch_rows_are_independent(slug: str) -> None:
    model, ids = llama(), tokens(3, N + STEPS)
    with attached(sparse(slug)):
        together = logits(model, ids, steps=STEPS)
        alone = torch.cat([logits(model, row, steps=STEPS) for row in ids.split(1)])
    assert error(together, alone) < SAME


@pytest.mark.parametrize("chunks", [[40, 37], [23, 3, 50, 1]], ids=str)
@pytest.mark.parametrize("slug", without("chunked"))
def test_chunked_prompt(slug: str, chunks: list[int]) -> None:
    if 1 in chunks and phase_of(slug) != "prefill":
        chunks = [23, 4, 50]  # a single token ends a prompt
    if phase_of(slug) == "decode":
        chunks = [23, 17, 37]  # up to 16 tokens on a filled cache are decoding
    model, ids = llama(), tokens(2, N + STEPS)
    with attached(sparse(slug)):
        at_once = logits(model, ids, steps=STEPS)
        in_parts = logits(model, ids, steps=STEPS, chunks=chunks)
    assert error(at_once, in_parts) < SAME


@pytest.mark.parametrize("slug", without("stepwise"))
def test_token_by_token(slug: str) -> None:
    model, ids = llama(), tokens(1, 60)
    with attached(sparse(slug)):
        assert error(logits(model, ids), logits(model, ids, chunks=[1] * 60)) < SAME


@pytest.mark.parametrize("slug", without("future"))
def test_nothing_from_the_future(slug: str) -> None:
    model, ids = llama(), tokens(1, N)
    changed = ids.clone()
    changed[:, 50:] = tokens(1, N - 50, seed=8)
    with attached(sparse(slug)):
        assert error(logits(model, ids)[:, :50], logits(model, changed)[:, :50]) < SAME


@pytest.mark.parametrize("slug", [slug for slug in ALL if issubclass(METHODS[slug], Prefill) and phase_of(slug) == "prefill"])
def test_no_value_from_the_future(slug: str) -> None:
    """Whatever decides the pattern, output i is made of values up to i."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 150, 16, generator=generator).to(DEVICE) for h in (6, 2, 2))
    other = v.clone()
    other[:, :, 90:] = torch.randn(1, 2, 60, 16, generator=generator).to(DEVICE)
    found = plan("llama", sparse(slug), torch.float64)  # of a model with these heads
    a, b = (saccade.attention(q, k, x, method=sparse(slug), plan=found) for x in (v, other))
    assert error(a[:, :, :90], b[:, :, :90]) == 0


@pytest.mark.parametrize("n", [1, 17, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 15, 16, 64))])
@pytest.mark.parametrize("slug", ALL)
def test_short_prompts(slug: str, n: int) -> None:
    model, ids = llama(), tokens(2, n)
    with attached(sparse(slug)):
        out = greedy(model, ids, new=4)
    assert out.shape == (2, n + 4)
    with attached(opened(slug)):
        assert torch.equal(greedy(model, ids, new=4), dense_generation(2, n))


def dense_generation(batch: int, n: int, **options: object) -> torch.Tensor:
    return greedy(llama(), tokens(batch, n), new=4, **options)


@pytest.mark.parametrize("slug", ALL)
def test_beam_search(slug: str) -> None:
    with attached(opened(slug)):
        out = greedy(llama(), tokens(2, N), new=4, num_beams=3)
    assert torch.equal(out, dense_generation(2, N, num_beams=3))
    with attached(sparse(slug)):
        assert greedy(llama(), tokens(2, N), new=4, num_beams=3).shape == out.shape


@pytest.mark.parametrize("slug", ALL)
def test_reordered_rows_go_on_as_themselves(slug: str) -> None:
    model, ids, more = llama(), tokens(3, N), tokens(3, 20, seed=3)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    with attached(sparse(slug)), torch.no_grad():
        straight, turned = DynamicCache(config=model.config), DynamicCache(config=model.config)
        for c in (straight, turned):
            model(ids, past_key_values=c)
            for i in range(6):
                model(more[:, i : i + 1], past_key_values=c)
        turned.reorder_cache(order)
        for i in range(6, 20):
            a = model(more[:, i : i + 1], past_key_values=straight).logits
            b = model(more[order, i : i + 1], past_key_values=turned).logits
            assert error(a[order], b) < SAME


@pytest.mark.parametrize("slug", ALL)
def test_copied_cache_goes_on_alike(slug: str) -> None:
    model, ids, more = llama(), tokens(1, N), tokens(1, 6, seed=3)
    with attached(sparse(slug)), torch.no_grad():
        first = DynamicCache(config=model.config)
        model(ids, past_key_values=first)
        model(more[:, :1], past_key_values=first)
        second = copied(first)
        runs = [[model(more[:, i : i + 1], past_key_values=c).logits for i in range(1, 6)] for c in (first, second)]
    for a, b in zip(*runs, strict=True):
        assert error(a, b) == 0


@pytest.mark.parametrize("slug", ALL)
def test_prompt_lookup(slug: str) -> None:
    model = llama()
    ids = tokens(1, 20).repeat(1, 4)  # repeats, so that guesses are made and some are right
    with attached(opened(slug)):
        assert torch.equal(greedy(model, ids, 16, prompt_lookup_num_tokens=5), greedy(model, ids, 16))
    with attached(sparse(slug)):
        guessed = greedy(model, ids, 16, prompt_lookup_num_tokens=5)
        # guesses ride on the prompt's call, so what is exact in chunks is exact here
        if phase_of(slug) != "cache" and "chunked" not in info(slug).opts_out:
            assert torch.equal(guessed, greedy(model, ids, 16))
        assert guessed.shape == (1, 96)


@pytest.mark.parametrize("slug", [slug for slug in ALL if phase_of(slug) != "cache"])
def test_taking_tokens_back(slug: str) -> None:
    """Steps, a crop, and the same steps again give the same."""
    model, ids, more = llama(), tokens(2, N), tokens(2, 24, seed=3)
    with attached(sparse(slug)), torch.no_grad():
        c = DynamicCache(config=model.config)
        model(ids, past_key_values=c)
        once = [model(more[:, i : i + 1], past_key_values=c).logits for i in range(24)]
        c.crop(-21)
        again = [model(more[:, i : i + 1], past_key_values=c).logits for i in range(3, 24)]
    for a, b in zip(once[3:], again, strict=True):
        assert error(a, b) < SAME


@pytest.mark.parametrize("slug", ALL)
def test_second_turn(slug: str) -> None:
    """A longer conversation on the same cache: the new turn is fed once, and positions go on."""
    model, ids, turn = llama(), tokens(1, N), tokens(1, 30, seed=4)
    results = []
    for spec in (None, opened(slug), sparse(slug)):
        c = DynamicCache(config=model.config)
        context = saccade.attach(model) if spec is None else attached(spec)
        with context:
            first = greedy(model, ids, 4, past_key_values=c)
            seen = c.get_seq_length()
            second = greedy(model, torch.cat([first, turn], 1), 4, past_key_values=c)
        assert seen == N + 3 and c.get_seq_length() == N + 4 + 30 + 3
        results.append(second)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("slug", ALL)
def test_compressing_after_every_call(slug: str) -> None:
    with attached(opened(slug), when="call"):
        assert torch.equal(greedy(llama(), tokens(2, N), 4), dense_generation(2, N))
    with attached(sparse(slug), when="call") as handle:
        logits(llama(), tokens(2, N), chunks=[30, 30, 17])
        after = handle.stats()
    if info(slug).frees_memory:
        with saccade.attach(llama()) as handle:
            logits(llama(), tokens(2, N), chunks=[30, 30, 17])
            assert after.kv_bytes < handle.stats().kv_bytes


@pytest.mark.parametrize("slug", ALL)
def test_spec_builds_the_same_method(slug: str) -> None:
    for spec in (slug, sparse(slug), opened(slug)):
        assert build(build(spec).spec) == build(spec)


@pytest.mark.parametrize("slug", ALL)
def test_unknown_field_names_the_nearest(slug: str) -> None:
    with pytest.raises(ValueError, match="has no field 'budgett'"):
        build(f"{slug}(budgett=1)")


@pytest.mark.parametrize("slug", [slug for slug in ALL if "calibration" in info(slug).needs])
def test_plan_of_another_model_is_refused(slug: str) -> None:
    other = plan("llama-mqa", sparse(slug), torch.float64)
    with pytest.raises(ValueError, match="made for another model"):
        saccade.attach(llama(), **{phase_of(slug): sparse(slug)}, plan=other)
    with pytest.raises(ValueError, match="needs a calibration plan"):
        saccade.attach(llama(), **{phase_of(slug): sparse(slug)})
