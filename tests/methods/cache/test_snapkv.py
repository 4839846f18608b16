"""SnapKV (snapkv, 2404.14469): the claims of the paper, on constructed data and on the pocket model."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, greedy, llama, logits, tokens
from tests.methods.cache.needles import found, pocket, prompts
from torch import Tensor
from transformers import DynamicCache

import saccade
from saccade.attach import capture
from saccade.methods import build
from saccade.methods.cache.snapkv import SnapKV
from saccade.parts.keep import best_slots
from saccade.parts.mass_sums import mass_sums
from saccade.parts.probabilities import probabilities
from saccade.parts.window_votes import window_votes

N, WINDOW, PEAKS = 200, 16, (100, 105, 110)


def planted(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """The last WINDOW queries look at the three peaks and at nothing else."""
    _, k, v = random_qkv(n, dim=8)
    k = 0.01 * k
    k[:, :, PEAKS, 0] = 20.0
    q = torch.zeros(1, 4, n, 8, dtype=torch.float64)
    q[:, :, -WINDOW:, 0] = 1.0
    return q, k, v


def kept_after(policy: SnapKV, q: Tensor, k: Tensor, v: Tensor, chunks: tuple[int, ...] = ()) -> list[list[int]]:
    single, begin = Single(policy), 0
    for length in (*chunks, q.shape[2] - sum(chunks)):
        single.feed(*(x[:, :, begin : begin + length] for x in (q, k, v)))
        begin += length
    single.end_prompt()
    return single.kept()


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_planted_span_survives_with_its_neighbours(pooling: str) -> None:
    span = [p + d for p in PEAKS for d in (-2, -1, 0, 1, 2)]
    policy = SnapKV(budget=WINDOW + len(span), window=WINDOW, kernel=5, pooling=pooling)
    assert kept_after(policy, *planted()) == [[*span, *range(N - WINDOW, N)]] * 2


def test_without_pooling_only_the_peaks_survive() -> None:
    policy = SnapKV(budget=WINDOW + 15, window=WINDOW, kernel=1)
    for head in kept_after(policy, *planted()):
        assert set(PEAKS) <= set(head)
        assert not {p + d for p in PEAKS for d in (-2, -1, 1, 2)} <= set(head)
    assert kept_after(SnapKV(budget=WINDOW + 3, window=WINDOW, kernel=1), *planted())[0][:3] == list(PEAKS)


def test_votes_are_those_of_the_equation() -> None:
    """Softmax over all entries, causal in the window, summed over its queries, window columns out, pooled, mean of the
    group."""
    q, k, _ = random_qkv(60, batch=2)
    w = 8
    scores = q[:, :, -w:] @ k.repeat_interleave(2, 1).mT / 8**0.5
    hidden = torch.arange(60) > torch.arange(60 - w, 60)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    votes = weights.sum(2)[..., : 60 - w]
    padded = torch.nn.functional.pad(votes, (2, 2))
    pooled = sum(padded[..., i : i + 60 - w] for i in range(5)) / 5
    expected = pooled.unflatten(1, (2, 2)).mean(2)
    got = window_votes(q[:, :, -w:], k, scale=8**-0.5, kernel=5)
    assert got.dtype == torch.float32
    assert (got[..., : 60 - w] - expected).abs().max() < 1e-6
    assert (got[..., 60 - w :] == 0).all()


def test_votes_of_heads_of_unequal_length() -> None:
    """Gaps at the end of a head change nothing."""
    q, k, _ = random_qkv(60)
    holes = k.clone()
    holes[:, 1, 45:] = torch.nan
    valid = torch.ones(1, 2, 60, dtype=torch.bool)
    valid[:, 1, 45:] = False
    got = window_votes(q[:, :, -8:], holes.nan_to_num(1e6), scale=0.3, valid=valid, kernel=3)
    first = window_votes(q[:, :2, -8:], k[:, :1], scale=0.3, kernel=3)
    second = window_votes(q[:, 2:, -8:], k[:, 1:, :45], scale=0.3, kernel=3)
    assert torch.equal(got[:, :1], first)
    assert torch.equal(got[:, 1:, :45], second) and (got[:, 1:, 45:] == 0).all()


@pytest.mark.parametrize("chunks", [(100, 50), (150,), (150, 47), (184, 8, 4)], ids=str)
def test_chunked_prompt_keeps_the_same(chunks: tuple[int, ...]) -> None:
    q, k, v = random_qkv(N, sharp=3.0)
    policy = SnapKV(budget=0.25, window=WINDOW)
    assert kept_after(policy, q, k, v, chunks) == kept_after(policy, q, k, v)


def test_guesses_that_are_taken_back_leave_no_vote() -> None:
    q, k, v = random_qkv(N, sharp=3.0)
    policy = SnapKV(budget=0.25, window=WINDOW)
    plain = kept_after(policy, q[:, :, : N - 10], k[:, :, : N - 10], v[:, :, : N - 10])
    single = Single(policy)
    single.feed(q, k, v)
    single.layer.crop(-10)
    assert single.kept() == plain


def test_cap_above_the_length_is_the_identity() -> None:
    model, ids = llama(), tokens(2, 60)
    dense = logits(model, ids, steps=10)
    for spec in ("snapkv(budget=51)", "snapkv", "snapkv(budget=1.0)"):
        with saccade.attach(model, cache=spec):
            assert error(logits(model, ids, steps=10), dense) < 1e-9


def test_later_tokens_stay_and_a_later_turn_is_compressed_again() -> None:
    model, ids, turn = llama(), tokens(1, 60), tokens(1, 30, seed=4)
    cache = DynamicCache(config=model.config)
    with saccade.attach(model, cache="snapkv(budget=30, window=8)") as handle:
        first = greedy(model, ids, 10, past_key_values=cache)
        assert handle.stats().kept == [[39, 39]] * 2
        greedy(model, torch.cat([first, turn], 1), 5, past_key_values=cache)
        assert handle.stats().kept == [[34, 34]] * 2
        assert cache.get_seq_length() == 60 + 10 + 30 + 4
        newest = cache.layers[0].positions()[0, 0, -12:].tolist()
        assert newest == list(range(92, 104))


@pytest.fixture(scope="module")
def attended() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries and keys of a prompt, and how much the answer's queries look at each of its entries, layer by layer."""
    ids, (answer,) = prompts(1024, (0.5,), seed=3)
    whole = torch.cat([ids, torch.tensor([[byte + 3 for byte in answer]])], 1)
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(whole)
    n, m = ids.shape[1], len(answer)
    return [
        (x.q[:, :, :n], x.k[:, :, :n], probabilities(x.q[:, :, n:], x.k, scale=x.scale)[..., :n].sum((2, 3)))
        for x in layers
        if x.q.shape[2] == n + m
    ]


def test_pocket_window_votes_beat_accumulated_attention(attended: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Hit rate: what generation looks at most is in the kept set. Sums over the whole prompt favour its start.

    Measured: 0.45 of the true top entries for votes, 0.22 for sums, of whose picks 0.67 lie in the first half.
    """
    keep, window = 128, 32
    hits = {"votes": 0.0, "sums": 0.0}
    bias = 0.0
    for q, k, truth in attended:
        n = k.shape[2]
        wanted = best_slots(truth[..., : n - window], keep)[0]
        sums = mass_sums(q, k, scale=64**-0.5)[..., : n - window]
        votes = window_votes(q[:, :, -window:], k, scale=64**-0.5, kernel=5)[..., : n - window]
        for name, scores in (("votes", votes), ("sums", sums)):
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best_slots(scores, keep)[0], True)
            hits[name] += float(chosen.gather(-1, wanted).float().mean()) / len(attended)
        bias += float((best_slots(sums, keep)[0] < n // 2).float().mean()) / len(attended)
    assert bias > 0.55
    assert hits["votes"] > hits["sums"] + 0.1


def test_pocket_finds_the_needle() -> None:
    """A quarter of the cache, query-aware. The pocket model reads bytes, about four to a token of the paper's models,
    so votes are pooled over 31 positions instead of 5; at 5 the ends of long values are lost."""
    ids, answers = prompts(2048, (0.1, 0.5))
    assert found(ids, answers, "snapkv(budget=0.25, kernel=31)") == [True, True]
    assert found(ids[:1], answers[:1], "random(budget=0.25)") == [False]


@pytest.mark.parametrize(
    "fields", ["budget=0", "budget=0.0", "budget=32", "window=0", "kernel=4", "kernel=-1", "pooling='min'"]
)
def test_fields_are_checked(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        build(f"snapkv({fields})")
