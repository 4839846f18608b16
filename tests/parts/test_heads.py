"""Reducing scores over the heads of a group."""

from __future__ import annotations

import pytest
import torch

from saccade.parts.heads import REDUCTIONS, check_reduction, reduce_heads

SCORES = torch.tensor([[1.0, 5.0, 0.0], [4.0, 2.0, 0.0], [7.0, 0.0, 3.0], [0.0, 8.0, 3.0]])[None]  # 4 query, 2 key heads


def test_none_leaves_every_head_its_own_scores() -> None:
    assert torch.equal(reduce_heads(SCORES, 2, "none"), SCORES)


def test_group_max_takes_the_head_that_wants_a_unit_most() -> None:
    want = torch.tensor([[[4.0, 5.0, 0.0], [7.0, 8.0, 3.0]]])
    assert torch.equal(reduce_heads(SCORES, 2, "group_max"), want)


@pytest.mark.parametrize("how", sorted(REDUCTIONS))
def test_without_groups_nothing_changes(how: str) -> None:
    assert torch.equal(reduce_heads(SCORES, 4, how), SCORES)


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match="quest got reduce='mean': expected one of none, group_max"):
        check_reduction("quest", "mean")
