from __future__ import annotations

import pytest
import torch

from saccade.parts.equalcost import largest_within
from saccade.parts.sizes import check_size, resolve


@pytest.mark.parametrize("size", [0, -1, 0.0, 1.5, True, "a", None])
def test_what_is_no_size_is_refused_in_one_sentence(size: object) -> None:
    with pytest.raises(ValueError, match=r"minference\(columns=.*tokens from 1 on nor a share"):
        check_size("minference", "columns", size)


def test_tokens_and_shares() -> None:
    for size in (1, 4096, 0.25, 1.0):
        check_size("minference", "columns", size)
    assert [resolve(0.07, 100), resolve(0.5, 3), resolve(1000, 40), resolve(7, 40), resolve(1.0, 40)] == [7, 2, 40, 7, 40]


def test_largest_sizes_within_a_cost() -> None:
    """Cost a * b + b: for base (2, 1) and target 110 the factor is 7 (14 * 7 + 7 = 105), for 10 it is 2 (4 * 2 + 2)."""
    target = torch.tensor([[110, 10], [0, 10**6]])
    found = largest_within(
        target, lambda s: s[..., 0] * s[..., 1] + s[..., 1], torch.tensor([2.0, 1.0]), least=torch.tensor([1, 1]), most=50
    )
    assert found[0].tolist() == [[14, 7], [4, 2]]
    assert found[1].tolist() == [[1, 1], [50, 31]]  # never below the least, never above the most
