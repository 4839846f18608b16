from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core import Budget, Mass, Threshold
from saccade.parts.choose import choose, ranks

weights = st.lists(st.integers(0, 5), min_size=1, max_size=30)


def kept(scores: list[float], budget: object) -> list[int]:
    return choose(torch.tensor(scores).double(), budget).nonzero().flatten().tolist()


@given(weights)
def test_ranks_order_by_score_then_place(scores: list[int]) -> None:
    found = ranks(torch.tensor(scores)).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert [found[i] for i in order] == list(range(len(scores)))


def test_the_entry_that_crosses_the_target_is_kept() -> None:
    scores = [1.0, 4.0, 3.0, 2.0]
    assert kept(scores, Mass(0.4)) == [1]  # 4 of 10 is exactly enough
    assert kept(scores, Mass(0.41)) == [1, 2]
    assert kept(scores, Mass(0.7)) == [1, 2]
    assert kept(scores, Mass(0.75)) == [1, 2, 3]


def test_counts_ratios_thresholds_and_ties() -> None:
    scores = [1.0, 1.0, 2.0, 1.0]
    assert kept(scores, 2) == [0, 2]
    assert kept(scores, 0.5) == [0, 2]
    assert kept(scores, Threshold(1.0)) == [2]
    assert kept([float("-inf"), 1.0, float("-inf")], 3) == [1]


def test_full_mass_opens_fully() -> None:
    assert kept([1.0, 0.0, 0.0, 1.0], Mass(1.0)) == [0, 1, 2, 3]
    assert kept([1.0, float("-inf"), 0.0], Mass(1)) == [0, 2]


@settings(max_examples=60)
@given(weights, st.floats(0.01, 0.99))
def test_mass_is_reached_with_the_fewest(scores: list[int], share: float) -> None:
    if not sum(scores):
        return
    chosen = kept([float(s) for s in scores], Mass(share))
    best = sorted(scores, reverse=True)
    enough = next(i for i in range(1, len(best) + 1) if sum(best[:i]) >= share * sum(best))
    assert len(chosen) == enough == int(Budget.of(Mass(share)).counts(torch.tensor(scores).double()))
    assert sorted((scores[i] for i in chosen), reverse=True) == best[:enough]


def test_rows_are_chosen_apart() -> None:
    scores = torch.tensor([[[3.0, 1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]]])
    assert choose(scores, Mass(0.5)).sum(-1).tolist() == [[1], [2]]
