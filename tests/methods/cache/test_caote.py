"""CAOTE (caote, 2504.14051): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import greedy, llama, tokens
from tests.methods.cache.clustered import look, relative
from tests.methods.cache.needles import found, pocket, prompts, streams
from torch import Tensor

import saccade
from saccade.attach import capture
from saccade.attach.capture import Captured
from saccade.methods import build
from saccade.methods.cache.caote import CAOTE
from saccade.methods.cache.snapkv import SnapKV
from saccade.parts.output_error import output_error

N = 80


def kept_by(method: str, q: Tensor, k: Tensor, v: Tensor, when: str = "prompt", chunk: int | None = None) -> list[list[int]]:
    single = Single(build(method), when=when)
    for begin in range(0, q.shape[2], chunk or q.shape[2]):
        end = begin + (chunk or q.shape[2])
        single.feed(*(x[:, :, begin:end] for x in (q, k, v)))
    single.end_prompt()
    return single.kept()


def left_after(weights: Tensor, values: Tensor, gone: int) -> Tensor:
    """The output of one head without one entry."""
    left = weights.clone()
    left[gone] = 0
    return left / left.sum() @ values


def test_a_single_eviction_is_never_worse_than_by_attention() -> None:
    """TOVA's score is true attention, so the error that CAOTE ranks by is exact."""
    better = 0
    for seed in range(30):
        q, k, v = random_qkv(N, query_heads=2, seed=seed, sharp=1.0)
        by_score, by_error = (
            kept_by(spec, q, k, v)
            for spec in (f"snapkv(budget={N - 1}, window=1, kernel=1)", f"caote(base='snapkv(budget={N - 1}, window=1, kernel=1)')")
        )
        for h in range(2):
            alpha = (k[0, h] @ q[0, h, -1] / 8**0.5).softmax(-1)
            # the newest entry stays whatever its score, and has no vote: the weights of the others are ranked
            alpha[-1] = 0
            alpha /= alpha.sum()
            out = alpha @ v[0, h]
            errors = [
                float((left_after(alpha, v[0, h], (set(range(N)) - set(kept[h])).pop()) - out).norm()) for kept in (by_score, by_error)
            ]
            assert errors[1] <= errors[0] + 1e-12
            better += errors[1] < errors[0] - 1e-12
    assert better > 20


def heavy_but_redundant() -> tuple[Tensor, Tensor, Tensor]:
    """Entry 20 gets a large share of the attention, and its value is what the others give anyway; entry 50 gets little and is unlike."""
    _, k, v = random_qkv(N, query_heads=2, seed=3)
    k = 0.01 * k
    k[:, :, 20, 0] = 1.0
    k[:, :, 50, 0] = -1.0
    v = 0.3 * v
    v[..., 1] += 1.0
    v[:, :, 50, 1] -= 30.0
    q = torch.zeros(1, 2, N, 8, dtype=torch.float64)
    q[..., 0] = 5.0
    weights = (q[:, :, -1:] @ k.mT / 8**0.5).softmax(-1)
    for _ in range(50):
        # the value of entry 20 is the output itself
        v[:, :, 20] = (weights @ v).squeeze(2)
    return q, k, v


def test_a_heavy_entry_whose_value_is_the_output_goes_first() -> None:
    base = f"snapkv(budget={N - 1}, window=1, kernel=1)"
    by_score, by_error = (kept_by(spec, *heavy_but_redundant()) for spec in (base, f"caote(base='{base}')"))
    assert all(20 in head and 50 not in head for head in by_score)
    assert all(20 not in head and 50 in head for head in by_error)


def test_weights_and_output_are_computed_anew_after_each_block() -> None:
    """Values of two kinds: as those of one kind go, the output turns to the other and what is dispensable changes."""
    q, k, v = random_qkv(N, seed=3)
    v[:, :, : N // 2, 0] += 3
    v[:, :, N // 2 :, 0] -= 3
    count, recent = 24, 12
    probs = (q @ k.repeat_interleave(2, 1).mT / 8**0.5).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).softmax(-1)
    mass = probs.unflatten(1, (2, 2)).sum((2, 3))
    found_sets = []
    for block in (1, 10, 1000):
        expected = []
        for h in range(2):
            alive = list(range(N))
            while len(alive) > count:
                errors = output_error(mass[:, h : h + 1, alive], v[:, h : h + 1, alive])[0, 0]
                errors[len(alive) - recent :] = torch.inf
                goes = errors.sort().indices[: min(block, len(alive) - count)].tolist()
                alive = [slot for i, slot in enumerate(alive) if i not in goes]
            expected.append(alive)
        found_sets.append(kept_by(f"caote(base='h2o(budget={count})', block={block})", q, k, v))
        assert found_sets[-1] == expected
    assert found_sets[0] != found_sets[1] != found_sets[2]


def test_fast_takes_the_mean_of_the_values() -> None:
    q, k, v = random_qkv(N, seed=6, sharp=3.0)
    exact, fast = (kept_by(f"caote(base='h2o(budget=30)', fast={fast})", q, k, v) for fast in (False, True))
    assert exact != fast
    assert all(len(set(a) & set(b)) > 24 for a, b in zip(exact, fast, strict=True))


def test_prompt_in_blocks_evicts_after_each() -> None:
    """The paper's prefill: a block comes in, as many entries go."""
    q, k, v = random_qkv(N, seed=7)
    single = Single(CAOTE(base="h2o(budget=30)", block=16), when="call")
    for begin in range(0, N, 16):
        single.feed(*(x[:, :, begin : begin + 16] for x in (q, k, v)))
        assert single.layer.physical == min(begin + 16, 30)
    assert all(set(range(N - 15, N)) <= set(head) for head in single.kept())
    assert single.kept() != kept_by("caote(base='h2o(budget=30)', block=16)", q, k, v)


def test_decoding_evicts_one_at_a_time_and_keeps_the_newest() -> None:
    q, k, v = random_qkv(N, seed=8)
    single = Single(CAOTE(base="h2o(budget=20)"))
    single.feed(*(x[:, :, :50] for x in (q, k, v)))
    for i in range(50, N):
        single.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
        assert single.layer.physical == 20
        assert all(set(range(i - 9, i + 1)) <= set(head) for head in single.kept())


@pytest.fixture(scope="module")
def captured() -> list[Captured]:
    ids = torch.cat([streams(1, 1087, seed=2), prompts(1087, (0.4,), seed=3)[0][:, :1088]])
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids)
    return layers


def pocket_error(layers: list[Captured], method: str) -> float:
    """Relative output error of the 64 queries after a prompt of 1024 tokens, mean over layers, heads and rows."""
    total = 0.0
    for x in layers:
        single = Single(build(method), layer=x.layer)
        single.feed(x.q[:, :, :1024], x.k[:, :, :1024], x.v[:, :, :1024])
        single.end_prompt()
        slots, later = single.layer.open(), x.q[:, :, 1024:]
        total += relative(look(later, slots.keys, slots.values), look(later, x.k[:, :, :1024], x.v[:, :, :1024])) / len(layers)
    return total


OTHERS = [pytest.param(spec, marks=pytest.mark.slow) for spec in ("snapkv(budget=0.5)", "snapkv(budget=0.25)")]


@pytest.mark.parametrize("base", ["h2o(budget=0.5)", *OTHERS])
def test_pocket_output_error_falls_on_both_bases(captured: list[Captured], base: str) -> None:
    """Measured: H2O 0.1201 -> 0.1166 and SnapKV 0.0895 -> 0.0870 at half the cache, SnapKV 0.1790 -> 0.1772 at a quarter."""
    assert pocket_error(captured, f"caote(base='{base}')") < pocket_error(captured, base)


def test_pocket_single_evictions_are_never_worse(captured: list[Captured]) -> None:
    """True attention of the newest query, every layer and head: the entry of least error moves the output least."""
    for x in captured:
        for h in range(6):
            weights = (x.k[:, h // 3, :1024].double() @ x.q[:, h, 1023].double().unsqueeze(-1) * x.scale).squeeze(-1).softmax(-1)
            values = x.v[:, h // 3, :1024].double()
            errors = output_error(weights[:, None], values[:, None])[:, 0]
            for b in range(2):
                out = weights[b] @ values[b]
                by_error, by_score = (left_after(weights[b], values[b], int(s[b].argmin())) - out for s in (errors, weights))
                assert by_error.norm() <= by_score.norm() * (1 + 1e-9)


def test_pocket_finds_the_needle_in_a_quarter_of_the_cache() -> None:
    ids, answers = prompts(1024, (0.3,))
    assert found(ids, answers, "caote(base='snapkv(budget=0.25, kernel=31)')") == [True]


def test_pocket_memory_falls() -> None:
    ids, _ = prompts(512, (0.3,))
    sizes = []
    for method in (None, "caote(base='snapkv(budget=0.25, kernel=31)')"):
        with saccade.attach(pocket(), cache=method) as handle, torch.no_grad():
            out = pocket()(ids, use_cache=True)
            handle.compress(out.past_key_values)
            sizes.append(handle.stats().kv_bytes)
    assert sizes[1] < 0.27 * sizes[0]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generates_in_every_way(options: dict[str, int]) -> None:
    model, ids = llama(), tokens(1, 30).repeat(1, 2)
    with saccade.attach(model, cache="caote(base='h2o(budget=24)')") as handle:
        assert greedy(model, ids, 8, **options).shape == (1, 68)
        assert all(n <= 24 + 4 for layer in handle.stats().kept for n in layer)


def test_a_base_may_be_given_as_a_policy() -> None:
    assert CAOTE(base=SnapKV(budget=100)) == build("caote(base='snapkv(budget=100)')")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("block=0", "block=0"), ("block=True", "block=True"), ("fast=1", "fast=1"), ("base=3", "base=3"),
        ("base='l2-norm'", "l2-norm is not"), ("base='quest'", "quest is not"), ("base='h2o(budget=7.0)'", "budget"),
    ],
)  # fmt: skip
def test_fields_are_checked(fields: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(f"caote({fields})")
