"""Choices that are read again while the query stays almost the same."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.choice_cache import KEPT, ChoiceCache


def ids(value: int, batch: int = 2) -> Tensor:
    return torch.full((batch, 3), value)


def test_theta_decides_who_searches() -> None:
    same, other = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    cache = ChoiceCache()
    assert cache.get(same, 5, 0.9, lambda: ids(1)).tolist() == [[1] * 3] * 2
    assert cache.get(same * 7, 6, 1.0, lambda: ids(2)).tolist() == [[1] * 3] * 2, "length does not matter"
    # the second row has turned, the first one has not
    assert cache.get(other, 7, 0.9, lambda: ids(3)).tolist() == [[1] * 3, [3] * 3]
    assert cache.searches == 2
    # and each row is compared with the query of its own last choice
    assert cache.choices[-1].fingerprint.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert cache.get(-other, 8, -1, lambda: ids(4)).tolist() == [[1] * 3, [3] * 3] and cache.searches == 2
    assert cache.get(same, 9, 1.01, lambda: ids(5)).tolist() == [[5] * 3] * 2 and cache.searches == 3


def test_choices_made_with_tokens_that_were_taken_back_are_forgotten() -> None:
    cache = ChoiceCache()
    for at in range(10, 13):
        cache.get(torch.ones(1, 2), at, 2.0, lambda at=at: ids(at, 1))
    cache.truncate(11)
    assert cache.get(torch.ones(1, 2), 12, 0.9, lambda: ids(99, 1)).tolist() == [[11] * 3]
    cache.truncate(9)
    assert cache.get(torch.ones(1, 2), 12, 0.9, lambda: ids(99, 1)).tolist() == [[99] * 3]


def test_no_more_than_a_few_choices_are_held() -> None:
    cache = ChoiceCache()
    for at in range(3 * KEPT):
        cache.get(torch.ones(1, 2), at, 2.0, lambda at=at: ids(at, 1))
    assert len(cache.choices) == KEPT and cache.nbytes == KEPT * (2 * 4 + 3 * 4)


def test_reordered_rows_keep_their_own() -> None:
    cache = ChoiceCache()
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    cache.get(queries, 3, 0.9, lambda: torch.tensor([[1, 2], [3, 4]]))
    turned = cache.reorder(torch.tensor([1, 0, 1]))
    assert turned.get(queries[[1, 0, 1]], 4, 0.9, lambda: ids(9)).tolist() == [[3, 4], [1, 2], [3, 4]]
    assert cache.choices[-1].ids.tolist() == [[1, 2], [3, 4]]
