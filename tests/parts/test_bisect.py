"""parts.bisect: fitting thresholds."""

from __future__ import annotations

import pytest
import torch

from saccade.parts.bisect import bisect, first_within, halvings


def test_halvings_stop_above_the_floor() -> None:
    assert halvings(0.8, 0.1) == [0.8, 0.4, 0.2]
    assert halvings(1.0, 0.3) == [1.0, 0.5]
    with pytest.raises(ValueError, match="both must be positive"):
        halvings(0.1, 0.1)


def test_first_within_is_the_first_good_one_even_if_later_ones_are_bad() -> None:
    errors = torch.tensor([[5.0, 1.0, 3.0], [0.5, 0.5, 0.5], [9.0, 9.0, 2.0]])
    found = first_within(torch.tensor([7.0, 8.0, 9.0]), [0.4, 0.2, 0.1], errors, torch.tensor([2.0, 1.0, 2.0]))
    assert found.tolist() == [0.2, 0.4, 9.0]


def test_bisect_finds_each_threshold() -> None:
    wanted = torch.tensor([0.1, 0.5, 0.987, 1.0], dtype=torch.float64)
    tried = []

    def good(x: torch.Tensor) -> torch.Tensor:
        tried.append(x)
        return x >= wanted

    found = bisect(good, torch.zeros_like(wanted), torch.ones_like(wanted), 10)
    assert bool((found >= wanted).all()) and (found - wanted).max() <= 2**-10 and len(tried) == 10
    with pytest.raises(ValueError, match="at least one step"):
        bisect(good, wanted, wanted, 0)
