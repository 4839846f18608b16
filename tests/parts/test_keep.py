"""Choosing what stays: counts, protected ends, ties, gaps, latents."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.cache import Rectangle, Slots
from saccade.parts.keep import best_slots, keep_best


def chosen_by_hand(scores: list[float], held: int, count: int, sinks: int, recent: int) -> list[int]:
    """Sinks first, then the newest, then by score; ties go to the lower slot."""
    count = min(count, held)
    kept = list(range(min(sinks, count)))
    newest = [slot for slot in range(held - 1, -1, -1) if slot not in kept][: min(recent, count - len(kept))]
    kept += newest
    rest = sorted((slot for slot in range(held) if slot not in kept), key=lambda slot: (-scores[slot], slot))
    return sorted(kept + rest[: count - len(kept)])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 14), st.integers(0, 5), st.integers(0, 8), st.randoms(use_true_random=False))
def test_best_slots_against_sorting_by_hand(n: int, count: int, sinks: int, recent: int, rng) -> None:
    scores = [[[float(rng.randint(-2, 2)) for _ in range(n)] for _ in range(3)] for _ in range(2)]
    expected = [[chosen_by_hand(head, n, count, sinks, recent) for head in row] for row in scores]
    got, counts = best_slots(torch.tensor(scores), count, sinks=sinks, recent=recent)
    assert counts is None and got.tolist() == expected
    held = [[rng.randint(0, n) for _ in range(3)] for _ in range(2)]
    valid = torch.arange(n) < torch.tensor(held)[..., None]
    got, counts = best_slots(torch.tensor(scores), count, sinks=sinks, recent=recent, valid=valid)
    assert counts is not None and counts.tolist() == [[min(count, h) for h in row] for row in held]
    for b in range(2):
        for h in range(3):
            wanted = chosen_by_hand(scores[b][h], held[b][h], count, sinks, recent)
            assert got[b, h, : len(wanted)].tolist() == wanted


def test_a_count_below_the_protected_ends_keeps_the_newest() -> None:
    got, _ = best_slots(torch.zeros(1, 1, 20), 5, sinks=2, recent=8)
    assert got.tolist() == [[[0, 1, 17, 18, 19]]]


def test_scores_keep_their_precision() -> None:
    scores = 1 + torch.arange(4, dtype=torch.float64) * 1e-12
    assert best_slots(scores[None, None], 2)[0].tolist() == [[[2, 3]]]


def test_one_latent_for_all_heads_averages_the_scores() -> None:
    stored = Rectangle(torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6, 2), {"positions": torch.arange(6).expand(1, 1, 6)})
    slots = Slots(stored, torch.randn(1, 3, 6, 8), torch.randn(1, 3, 6, 8))
    scores = torch.zeros(1, 3, 6)
    scores[0, :, 1] = torch.tensor([9.0, 0.0, 0.0])
    scores[0, :, 4] = 2.0
    scores[0, :, 2] = 1.0
    wide = slots.keys
    keep_best(slots, scores, 2)
    assert slots.side["positions"].tolist() == [[[1, 4]]]
    assert torch.equal(slots.keys, wide[:, :, [1, 4]]) and slots.rectangle.keys.shape == (1, 1, 2, 4)
    keep_best(slots, scores[..., :2], 2)
    assert slots.length == 2
