"""Products with named rows, and columns that grow together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from saccade.parts.columns import cut, extend
from saccade.parts.dots import dots
from saccade.parts.picked import picked_dots


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 17])
def test_products_with_picked_rows_are_those_with_all_rows_picked(dtype: torch.dtype, count: int) -> None:
    g = torch.Generator().manual_seed(0)
    q, rows = torch.randn(2, 6, 8, generator=g).to(dtype), torch.randn(2, 3, 40, 8, generator=g).to(dtype)
    ids = torch.randint(40, (2, 6, count), generator=g)
    got = picked_dots(q, rows, ids)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(got, dots(q, rows).gather(-1, ids), rtol=1e-5, atol=1e-5)


def test_columns_grow_and_are_cut_together() -> None:
    state: dict[str, Any] = {}
    assert cut(state, 3, "a", "b") == 0
    a, b = torch.arange(24.0).view(1, 2, 4, 3), torch.arange(8).view(1, 2, 4)
    extend(state, a=a, b=b)
    extend(state, a=a[:, :, :1], b=b[:, :, :1])
    assert torch.equal(state["a"].view, torch.cat([a, a[:, :, :1]], 2)) and state["b"].n == 5
    assert cut(state, 3, "a", "b", "c") == 3 and torch.equal(state["b"].view, b[:, :, :3])
    assert cut(state, 9, "a", "b") == 3
