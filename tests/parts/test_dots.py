"""Products of queries with stored rows."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.estimate import Reduce, best
from saccade.parts.dots import dots
from saccade.parts.heads import BY_GROUP, reduce_heads


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 4 << 20])
def test_products_of_groups(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(best, "CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 16, generator=g, dtype=torch.float64).to(dtype)
    buffer = torch.randn(3, 2, 50, 16, generator=g, dtype=torch.float64).to(dtype)
    for n in (50, 41, 1, 0):
        rows = buffer[:, :, :n]  # as a growing buffer shows its content
        want = torch.einsum("bhge,bhne->bhgn", q.double().unflatten(1, (2, 3)), rows.double()).flatten(1, 2)
        got = dots(q, rows)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == (3, 6, n)
        assert torch.allclose(got.double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("reduce", list(BY_GROUP))
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_products_reduced_over_a_group(monkeypatch: pytest.MonkeyPatch, reduce: Reduce, dtype: torch.dtype) -> None:
    monkeypatch.setattr(best, "CHUNK", 1)
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 16, generator=g, dtype=torch.float64).to(dtype)
    rows = torch.randn(3, 2, 50, 16, generator=g, dtype=torch.float64).to(dtype)
    got = dots(q, rows, reduce)
    assert got.shape == (3, 6 if reduce == "none" else 2, 50)
    assert torch.equal(got, reduce_heads(dots(q, rows), 2, reduce))


def test_half_precision_products_do_not_tie() -> None:
    g = torch.Generator().manual_seed(1)
    q, rows = torch.randn(1, 1, 64, generator=g).bfloat16(), torch.randn(1, 1, 2000, 64, generator=g).bfloat16()
    assert len(dots(q, rows).unique()) > 1990
    assert len((q.unsqueeze(2) @ rows.mT).unique()) < 1500
