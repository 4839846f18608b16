from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from saccade.parts.probe import row_probabilities, strided_rows


def full_map(q: Tensor, k: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """The whole causal map, in float64 and the obvious way."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.double() @ k.mT * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n_q, n_k = q.shape[2], k.shape[2]
    future = torch.ones(n_q, n_k, dtype=torch.bool).triu(n_k - n_q + 1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


@pytest.fixture(params=[(90, 90), (31, 90), (1, 90)], ids=str)
def qk(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    n_q, n_k = request.param
    return (
        torch.randn(2, 6, n_q, 8, generator=generator, dtype=torch.float64),
        torch.randn(2, 2, n_k, 8, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_rows_are_those_of_the_whole_map(qk: tuple[Tensor, Tensor], softcap: float | None) -> None:
    q, k = qk
    rows = torch.arange(0, q.shape[2], 3)
    found = row_probabilities(q, k, rows, scale=0.7, softcap=softcap)
    assert (found - full_map(q, k, 0.7, softcap)[:, :, rows]).abs().max() < 1e-14
    assert row_probabilities(q.bfloat16(), k.bfloat16(), rows, scale=0.7).dtype == torch.float32


@pytest.mark.parametrize(("n", "share"), [(100, 0.05), (97, 0.1), (1000, 0.07), (5, 0.01), (64, 1.0), (50, 0.6)])
def test_strided_rows(n: int, share: float) -> None:
    rows = strided_rows(n, share).tolist()
    assert rows == sorted(set(rows)) and rows[0] >= 0
    assert rows[-1] == n - 1  # the tail is always sampled
    assert len(rows) == max(1, -(-round(share * n * 1e9) // 10**9))
    gaps = {b - a for a, b in pairwise(rows)}
    assert not gaps or max(gaps) - min(gaps) <= 1
