"""H2O (h2o, 2306.14048): the claims of the paper, on constructed data."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import Single, random_qkv
from tests.contract.harness import error, greedy, llama, logits, tokens
from torch import Tensor

import saccade
from saccade.core import Budget, CachePolicy
from saccade.methods import build
from saccade.methods.cache.h2o import H2O
from saccade.methods.cache.streaming_llm import StreamingLLM
from saccade.parts.accumulated import MASS


def simulated(
    q: Tensor, k: Tensor, v: Tensor, prompt: int, budget: float | int, recent: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's evaluation with masks: everything is stored, and what the policy has dropped is hidden.

    Returns the outputs `(B, Hq, N, D)`, what is left at the end, bool `(B, Hk, N)`, and its S.
    """
    batch, heads, n, dim = k.shape
    group = q.shape[1] // heads
    alive = torch.zeros(batch, heads, n, dtype=torch.bool)
    mass = torch.zeros(batch, heads, n, dtype=torch.float64)
    outs = []

    def look(first: int, last: int) -> None:
        rows = torch.arange(first, last)
        alive[:, :, first:last] = True
        hidden = ~alive[:, :, None] | (torch.arange(n) > rows[:, None])
        scores = (q[:, :, first:last] @ k.repeat_interleave(group, 1).mT) / dim**0.5
        weights = scores.masked_fill(hidden.repeat_interleave(group, 1), -torch.inf).softmax(-1)
        outs.append(weights @ v.repeat_interleave(group, 1))
        mass.add_(weights.unflatten(1, (heads, group)).sum((2, 3)))

    def evict(seen: int) -> None:
        b = Budget.of(budget).tokens(seen)
        newest = int(b * recent)
        for row in range(batch):
            for h in range(heads):
                while int(alive[row, h].sum()) > b:
                    held = alive[row, h].nonzero().flatten()
                    older = held[: len(held) - newest]
                    alive[row, h, older[mass[row, h, older].argmin()]] = False

    look(0, prompt)
    evict(prompt)
    for i in range(prompt, n):
        look(i, i + 1)
        evict(i + 1)
    return torch.cat(outs, 2), alive, mass


@pytest.mark.parametrize(("budget", "recent"), [(0.2, 0.5), (0.4, 0.25), (17, 0.5), (12, 0.0), (12, 1.0)])
def test_cache_equals_the_simulation_with_masks(budget: float | int, recent: float) -> None:
    q, k, v = random_qkv(110, batch=2)
    expected, alive, mass = simulated(q, k, v, 60, budget, recent)
    single = Single(H2O(budget=budget, recent=recent))
    got = [single.feed(q[:, :, :60], k[:, :, :60], v[:, :, :60])]
    for i in range(60, 110):
        got.append(single.feed(*(x[:, :, i : i + 1] for x in (q, k, v))))
        assert single.layer.physical <= Budget.of(budget).tokens(i + 1)
    assert (torch.cat(got, 2) - expected).abs().max() < 1e-9
    for row in range(2):
        assert single.kept(row) == [head.nonzero().flatten().tolist() for head in alive[row]]
    slots = single.layer.open()
    assert (slots.side[MASS] - mass.gather(-1, slots.side["positions"].long())).abs().max() < 1e-9


def test_sums_survive_reordered_and_copied_rows() -> None:
    """A row goes on as itself when beams change places."""
    q, k, v = random_qkv(90, batch=3)
    straight, turned = Single(H2O(budget=20)), Single(H2O(budget=20))
    order = torch.tensor([2, 0, 0])
    for single in (straight, turned):
        single.feed(*(x[:, :, :50] for x in (q, k, v)))
        single.steps(*(x[:, :, 50:60] for x in (q, k, v)))
    turned.layer.reorder_cache(order)
    a = straight.steps(*(x[:, :, 60:] for x in (q, k, v)))
    b = turned.steps(*(x[order, :, 60:] for x in (q, k, v)))
    assert (a[order] - b).abs().max() < 1e-12


@pytest.mark.parametrize("chunks", [(20, 40), (45, 15), (58, 2)], ids=str)
def test_chunked_prompt_sums_the_same(chunks: tuple[int, int]) -> None:
    q, k, v = random_qkv(90)
    whole, parts = Single(H2O(budget=0.3)), Single(H2O(budget=0.3))
    whole.feed(*(x[:, :, :60] for x in (q, k, v)))
    begin = 0
    for length in chunks:
        parts.feed(*(x[:, :, begin : begin + length] for x in (q, k, v)))
        begin += length
    a, b = (s.steps(*(x[:, :, 60:] for x in (q, k, v))) for s in (whole, parts))
    assert (a - b).abs().max() < 1e-9
    assert (whole.layer.open().side[MASS] - parts.layer.open().side[MASS]).abs().max() < 1e-9


def test_guesses_that_are_taken_back_leave_no_attention() -> None:
    q, k, v = random_qkv(90)
    plain, guessed = Single(H2O(budget=0.3)), Single(H2O(budget=0.3))
    plain.feed(*(x[:, :, :60] for x in (q, k, v)))
    plain.end_prompt()
    wrong = random_qkv(8, seed=7)
    guessed.feed(*(torch.cat([x[:, :, :60], w], 2) for x, w in zip((q, k, v), wrong, strict=True)))
    guessed.layer.crop(-8)
    assert guessed.kept() == plain.kept()
    for i in range(60, 80):
        plain.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
        step = (torch.cat([x[:, :, i : i + 1], w[:, :, :5]], 2) for x, w in zip((q, k, v), wrong, strict=True))
        guessed.feed(*step)
        guessed.layer.crop(-5)
        assert guessed.kept() == plain.kept()
    assert (guessed.layer.open().side[MASS] - plain.layer.open().side[MASS]).abs().max() < 1e-9


def test_padded_rows_keep_to_their_own_budgets() -> None:
    q, k, v = random_qkv(90, batch=2)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :30] = False
    both = Single(H2O(budget=0.3))
    both.feed(*(x[:, :, :50] for x in (q, k, v)), real)
    alone = [Single(H2O(budget=0.3)) for _ in range(2)]
    for b, begin in ((0, 30), (1, 0)):
        alone[b].feed(*(x[b : b + 1, :, begin:50] for x in (q, k, v)))
    for i in range(50, 90):
        out = both.feed(*(x[:, :, i : i + 1] for x in (q, k, v)))
        for b, begin in ((0, 30), (1, 0)):
            own = alone[b].feed(*(x[b : b + 1, :, i : i + 1] for x in (q, k, v)))
            assert (out[b : b + 1] - own).abs().max() < 1e-9
            assert both.layer.lengths()[b] == alone[b].layer.lengths()[0]
            assert [[p - begin for p in head] for head in both.kept(b)] == alone[b].kept()


def test_full_budget_is_dense() -> None:
    model, ids = llama(), tokens(2, 70)
    dense = logits(model, ids, steps=10)
    with saccade.attach(model, cache="h2o(budget=1.0)"):
        assert error(logits(model, ids, steps=10), dense) < 1e-9


def task(policy: CachePolicy | None) -> tuple[list[list[int]], Tensor]:
    """Entry 30 of 200 is looked at by everyone and holds the answer, in channel 3 of its value; then come 20 steps."""
    q, k, v = random_qkv(220, sharp=0.5)
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 30, 0] = 6.0
    v = 0.1 * v
    v[:, :, 30, 3] = 1.0
    single = Single(policy)
    single.feed(*(x[:, :, :200] for x in (q, k, v)))
    out = single.steps(*(x[:, :, 200:] for x in (q, k, v)))
    return single.kept(), out


def test_heavy_hitter_survives_and_a_window_fails() -> None:
    _, dense = task(None)
    kept, hitter = task(H2O(budget=40))
    window_kept, window = task(StreamingLLM(sinks=0, window=40))
    assert all(30 in head and len(head) == 40 for head in kept)
    assert all(30 not in head and len(head) == 40 for head in window_kept)
    assert (dense[..., 3] > 0.5).all() and (hitter[..., 3] > 0.5).all()
    assert (window[..., 3] < 0.2).all()
    assert (hitter - dense).norm() < 0.1 * (window - dense).norm()


def test_sums_are_float32_in_bfloat16_models() -> None:
    q, k, v = (x.bfloat16() for x in random_qkv(400, sharp=0.1))
    single = Single(H2O(budget=1.0))
    single.feed(q, k, v)
    single.end_prompt()
    mass = single.layer.open().side.get(MASS)
    assert mass is not None and mass.dtype == torch.float32
    rows = (q.float().unflatten(1, (2, 2)) @ k.float().unsqueeze(2).mT) * 8**-0.5
    hidden = torch.ones(400, 400, dtype=torch.bool).triu(1)
    exact = rows.double().masked_fill(hidden, -torch.inf).softmax(-1).sum((2, 3))
    # the newest 16 rows wait for the next call; a row adds at most its whole weight
    assert float((exact - mass).sum(-1).max()) == pytest.approx(2 * 16, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}], ids=str)
def test_generates_in_every_way(options: dict[str, int]) -> None:
    model, ids = llama(), tokens(1, 30).repeat(1, 2)
    with saccade.attach(model, cache="h2o(budget=24)") as handle:
        assert greedy(model, ids, 8, **options).shape == (1, 68)
        assert all(n <= 24 + 4 for layer in handle.stats().kept for n in layer)


@pytest.mark.parametrize("fields", ["budget=0", "budget=1.5", "recent=-0.1", "recent=2"])
def test_fields_are_checked(fields: str) -> None:
    with pytest.raises(ValueError, match=fields.split("=")[0]):
        build(f"h2o({fields})")
