"""Dividing a budget among layers."""

from __future__ import annotations

import pytest
import torch

from saccade.parts.allocation import share_out
from saccade.parts.layers import acting_layers, check_layers


def test_shares_follow_the_weights_and_hold_the_total() -> None:
    weights = torch.tensor([[1.0, 2.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    shares = share_out(weights, 0.2, least=0.01)
    assert (shares - torch.tensor([[0.1, 0.2, 0.3, 0.2], [0.2] * 4]).double()).abs().max() < 1e-7
    assert (shares.sum(-1) - 0.8).abs().max() < 1e-12


@pytest.mark.parametrize("mean", [0.01, 0.02, 0.3, 0.7, 0.95, 1.0])
def test_bounds_are_made_up_for_by_the_others(mean: float) -> None:
    weights = torch.tensor([[1e-4, 1.0, 2.0, 9.0], [5.0, 5.0, 1e-9, 4.0]])
    shares = share_out(weights, mean, least=0.01)
    assert (shares >= 0.01).all() and (shares <= 1).all()
    assert (shares.mean(-1) - mean).abs().max() < 1e-9
    inside = (shares[0] > 0.0101) & (shares[0] < 0.9999)
    ratio = (shares[0] / weights[0])[inside]
    assert inside.sum() < 2 or (ratio / ratio[0] - 1).abs().max() < 1e-6


def test_means_out_of_reach_are_refused() -> None:
    with pytest.raises(ValueError, match="can't have the mean"):
        share_out(torch.ones(3), 0.001, least=0.01)


def test_layers_are_named_from_both_ends() -> None:
    assert acting_layers((0, 1, -1), 6) == [2, 3, 4]
    assert acting_layers((), 2) == [0, 1]
    assert acting_layers((0, 9, -9), 3) == [1, 2]
    assert check_layers("x", [0, -1]) == (0, -1)
    with pytest.raises(ValueError, match="skip_layers"):
        check_layers("x", 3)
