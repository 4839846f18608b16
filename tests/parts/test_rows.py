"""Picking entries by row equals gathering them element by element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.parts.rows import pick_rows


def views() -> dict[str, Tensor]:
    x = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))
    return {
        "whole": x,
        "front of a buffer": x[:, :, :7],
        "end of a buffer": x[:, :, 3:],
        "one row of a batch": x[1:, :, :7],
        "heads inside tokens": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second entry": x[:, :, ::2],
        "some channels": x[..., 1:4],
        "one head for all": x[:, :1].expand(-1, 3, -1, -1),
        "one entry for all": x[:, :, :1].expand(-1, -1, 7, -1),
        "channels first": x.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("name", views())
@pytest.mark.parametrize("m", [0, 1, 5])
def test_equals_gather(name: str, m: int) -> None:
    x = views()[name]
    indices = torch.randint(x.shape[2], (x.shape[0], 3, m), generator=torch.Generator().manual_seed(1))
    got = pick_rows(x, indices)
    assert torch.equal(got, torch.gather(x, 2, indices.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])))
    assert got.is_contiguous() and got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_no_entries() -> None:
    assert pick_rows(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, dtype=torch.int64)).shape == (2, 3, 0, 4)
