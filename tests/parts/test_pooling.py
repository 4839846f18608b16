from __future__ import annotations

import pytest
import torch

from saccade.parts.pooling import pool_mean


@pytest.mark.parametrize("n", [1, 15, 16, 17, 48, 61])
def test_means_of_runs(n: int) -> None:
    x = torch.randn(2, 3, n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = torch.stack([run.mean(2) for run in x.split(16, dim=2)], dim=2)
    assert (pool_mean(x, 16) - expected).abs().max() < 1e-15


def test_half_precision_is_pooled_in_float32() -> None:
    x = torch.full((1, 1, 512, 1), 1.0, dtype=torch.bfloat16)
    x[0, 0, 0] = 300.0
    found = pool_mean(x, 512)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx((300 + 511) / 512)
