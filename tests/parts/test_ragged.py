"""Heads that keep different numbers of entries."""

from __future__ import annotations

import pytest
import torch

from saccade.parts.keep import best_slots
from saccade.parts.ragged import ranks, slots_of, staying


@pytest.mark.parametrize(("count", "sinks", "recent"), [(10, 0, 0), (10, 3, 4), (5, 3, 4), (2, 3, 4), (30, 1, 1)])
@pytest.mark.parametrize("ragged", [False, True])
def test_equal_counts_are_those_of_best_slots(count: int, sinks: int, recent: int, ragged: bool) -> None:
    scores = torch.randint(0, 6, (2, 3, 24), generator=torch.Generator().manual_seed(0)).float()  # with ties
    valid = None
    if ragged:
        valid = torch.arange(24) < torch.tensor([[24, 7, 12], [3, 20, 24]]).unsqueeze(-1)
    slots, counts = best_slots(scores, count, sinks=sinks, recent=recent, valid=valid)
    stay = staying(scores, count, sinks=sinks, recent=recent, valid=valid)
    for b in range(2):
        for h in range(3):
            n = slots.shape[-1] if counts is None else int(counts[b, h])
            assert stay[b, h].nonzero().flatten().tolist() == slots[b, h, :n].tolist()


def test_every_row_and_head_has_its_own_count() -> None:
    scores = torch.arange(8.0).expand(2, 2, 8)
    counts = torch.tensor([[[1], [3]], [[8], [2]]])
    stay = staying(scores, counts, sinks=1, recent=torch.tensor([[[0]], [[1]]]))
    assert [h.nonzero().flatten().tolist() for row in stay for h in row] == [[0], [0, 6, 7], list(range(8)), [0, 7]]
    slots, found = slots_of(stay)
    assert torch.equal(found, counts.squeeze(-1)) and slots.shape == (2, 2, 8)
    assert slots[0, 1, :3].tolist() == [0, 6, 7]


def test_ranks_are_a_permutation_with_ties_to_the_lower_slot() -> None:
    place = ranks(torch.tensor([[[1.0, 5.0, 1.0, 5.0]]]), 2)
    assert place.tolist() == [[[2, 0, 3, 1]]]
