"""Recent rows by place: appending, taking back, trimming, and means over what follows a place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.parts.followers import SLACK, RecentRows


def rows(n: int) -> torch.Tensor:
    return torch.randn(2, 3, n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def kept_rows(kept: RecentRows, begin: int, end: int) -> Tensor:
    found = kept.part(begin, end)
    assert found is not None
    return found


def test_means_over_the_rows_that_follow() -> None:
    x, kept = rows(50), RecentRows(50)
    kept.append(x[:, :, :30], 0)
    kept.append(x[:, :, 30:], 30)
    got = kept.mean_after(5, 20, 8)
    want = torch.stack([x[:, :, p + 1 : p + 8].mean(2) for p in range(5, 20)], 2)
    assert float((got - want).abs().max()) < 1e-12
    # fewer rows follow at the end, and none the last one
    assert float((kept.mean_after(45, 50, 8)[:, :, 2] - x[:, :, 48:].mean(2)).abs().max()) < 1e-12
    assert float(kept.mean_after(49, 50, 8).abs().max()) == 0


def test_rows_that_were_taken_back_are_replaced_and_old_ones_go() -> None:
    x, y, kept = rows(600), rows(40), RecentRows(20)
    kept.append(x[:, :, :10], 0)
    kept.append(y, 5)
    assert torch.equal(kept_rows(kept, 0, 45), torch.cat([x[:, :, :5], y], 2))
    for place in range(45, 600):
        kept.append(x[:, :, place : place + 1], place)
    assert kept.end == 600 and kept.begin > 300 and torch.equal(kept_rows(kept, 580, 600), x[:, :, 580:])
    assert kept.end - kept.begin >= 20 + SLACK and kept.part(kept.begin - 1, 600) is None
    kept.append(x[:, :, :3], 1000)  # a gap: nothing before it is known
    assert (kept.begin, kept.end) == (1000, 1003)
    assert torch.equal(kept_rows(kept.reorder(torch.tensor([1])), 1000, 1003), x[1:, :, :3])


def test_without_any_row_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"before place 20 was seen.*run the prompt through the model while the method is attached"):
        RecentRows(50).mean_after(5, 20, 8)
