"""Budget: a ratio, a count, a mass or a threshold, resolved the same way everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saccade.core import Budget, Mass, Threshold
from tests.core.cases import few

scores_of = st.lists(st.integers(0, 6), min_size=1, max_size=9)  # small integers: many ties


@few
@given(st.floats(0, 1, exclude_min=True), st.integers(0, 10**7))
def test_a_ratio_rounds_up_and_keeps_at_least_one(ratio: float, n: int) -> None:
    kept = Budget.of(ratio).tokens(n)
    assert kept == 0 if n == 0 else 1 <= kept <= n
    assert abs(kept - ratio * n) < 1 + 1e-8 or kept in (1, n)
    assert kept >= min(n, math.floor(ratio * n))


@few
@given(st.integers(1, 50), st.integers(1, 50))
def test_a_decimal_share_is_what_a_reader_expects(percent: int, hundreds: int) -> None:
    assert Budget.of(percent / 100).tokens(100 * hundreds) == percent * hundreds


@few
@given(st.integers(1, 10**9), st.integers(0, 10**6))
def test_a_count_is_kept_where_there_are_so_many(count: int, n: int) -> None:
    assert Budget.of(count).tokens(n) == min(count, n)


@few
@given(st.lists(scores_of, min_size=1, max_size=3), st.one_of(st.floats(0.01, 1), st.integers(1, 12)), st.data())
def test_counts_agree_with_tokens(rows: list[list[int]], amount: float | int, data: st.DataObject) -> None:
    width = max(map(len, rows))
    scores = torch.full((len(rows), width), -torch.inf)
    for i, row in enumerate(rows):
        scores[i, : len(row)] = torch.tensor(row, dtype=torch.float32)
    budget = Budget.of(amount)
    assert budget.counts(scores).tolist() == [budget.tokens(len(row)) for row in rows]
    n = data.draw(st.integers(1, 20))
    assert budget.counts(scores, n).tolist() == [min(budget.tokens(n), len(row)) for row in rows]


@few
@given(scores_of, st.floats(0.01, 1))
def test_mass_is_the_smallest_set_that_reaches_the_share(weights: list[int], share: float) -> None:
    scores = torch.tensor([*weights, -torch.inf])
    count = int(Budget.of(Mass(share)).counts(scores))
    ranked, total = sorted(weights, reverse=True), sum(weights)
    assert 1 <= count <= len(weights)
    assert sum(ranked[:count]) >= share * total
    assert count == 1 or sum(ranked[: count - 1]) < share * total


def test_mass_keeps_the_entry_that_crosses_and_all_that_weigh_at_share_one() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]])
    assert Budget.of(Mass(0.5)).counts(scores).tolist() == [1, 2]
    assert Budget.of(Mass(0.51)).counts(scores).tolist() == [2, 3]
    assert Budget.of(Mass(1)).counts(scores).tolist() == [3, 4]
    assert Budget.of(Mass(0.9)).counts(torch.full((2, 3), -torch.inf)).tolist() == [0, 0]


@few
@given(scores_of, st.integers(-1, 7))
def test_a_threshold_keeps_what_is_above_it(scores: list[int], value: int) -> None:
    row = torch.tensor([*map(float, scores), -torch.inf])
    assert int(Budget.of(Threshold(value)).counts(row)) == sum(score > value for score in scores)
    assert int(Budget.of(Threshold(-math.inf)).counts(row)) == len(scores)


def test_a_budget_is_taken_as_it_is_and_shown_as_it_is_written() -> None:
    budget = Budget(0.25)
    assert Budget.of(budget) is budget
    assert [str(Budget.of(x)) for x in (0.25, 64, Mass(0.9), Threshold(0.5))] == ["0.25", "64", "Mass(0.9)", "Threshold(0.5)"]
    assert Budget.of(1.0).tokens(7) == 7 and Budget.of(1).tokens(7) == 1


@pytest.mark.parametrize("bad", [0, -3, 0.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_amounts_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(bad)


@pytest.mark.parametrize("bad", [True, False, "0.25", None, [0.5], 1j])
def test_amounts_of_another_kind_are_refused(bad: object) -> None:
    with pytest.raises(TypeError, match="ratio"):
        Budget(bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [0, 1.0001, -0.5, math.nan, True, "0.5", None, Mass(0.5)])
def test_a_mass_is_a_share(bad: object) -> None:
    with pytest.raises(ValueError, match="share of the attention"):
        Mass(bad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("bad", [math.nan, True, "0.5", None])
def test_a_threshold_is_a_number(bad: object) -> None:
    with pytest.raises(ValueError, match="not a number"):
        Threshold(bad)  # pyright: ignore[reportArgumentType]


def test_budgets_that_need_scores_say_so() -> None:
    for amount in (Mass(0.9), Threshold(0.1)):
        with pytest.raises(ValueError, match="ratio or a number of tokens"):
            Budget.of(amount).tokens(10)
