"""parts.crossing: a mass that is not exceeded."""

from __future__ import annotations

import torch

from saccade.core import Budget, Mass
from saccade.parts.crossing import count_within


def test_the_crossing_entry_is_left_out_and_one_kept_at_least() -> None:
    weights = torch.tensor([0.125, 0.5, 0.125, 0.25])
    for share, count in ((0.3, 1), (0.5, 1), (0.74, 1), (0.75, 2), (0.87, 2), (0.875, 3), (0.99, 3), (1.0, 4)):
        assert int(count_within(weights.double(), torch.tensor(share))) == count, share
    # the rule of the other methods keeps one more
    assert int(Budget(Mass(0.8)).counts(weights)) == 3 and int(count_within(weights, torch.tensor(0.8))) == 2


def test_everything_even_where_the_sum_falls_short_of_one() -> None:
    weights = torch.full((3, 7), 1 / 7) * torch.tensor([1.0, 0.999, 1.001]).unsqueeze(-1)
    assert count_within(weights, torch.tensor([1.0, 1.0, 1.0])).tolist() == [7, 7, 7]
    assert count_within(weights, torch.tensor([0.2, 0.5, 0.9])).tolist() == [1, 3, 6]
