from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from saccade.parts.probe import column_mass, diagonal_mass, last_rows, row_probabilities, strided_rows


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


def test_column_mass_sums_rows_without_holding_them(qk: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk
    monkeypatch.setattr("saccade.parts.probe.ROWS", 7)
    held: list[int] = []

    def watched(*arguments: Tensor, **settings: float) -> Tensor:
        part = row_probabilities(*arguments, **settings)
        held.append(part.shape[2])
        return part

    monkeypatch.setattr("saccade.parts.probe.row_probabilities", watched)
    rows = strided_rows(q.shape[2], 0.5)
    found = column_mass(q, k, rows, scale=0.7)
    assert (found - full_map(q, k, 0.7)[:, :, rows].sum(2)).abs().max() < 1e-13
    assert max(held) <= 7 and sum(held) == len(rows)


def test_diagonals_are_summed_by_offset(qk: tuple[Tensor, Tensor]) -> None:
    q, k = qk
    rows = last_rows(q.shape[2], 20)
    p = row_probabilities(q, k, rows, scale=0.7)
    found = diagonal_mass(p)
    n = k.shape[2]
    for offset in (0, 1, 19, 20, n - len(rows), n - 1):
        expected = sum(p[..., r, i - offset] for r, i in enumerate(range(n - len(rows), n)) if i >= offset)
        assert (found[..., offset] - expected).abs().max() < 1e-14
    assert (found.sum(-1) - len(rows)).abs().max() < 1e-12  # all of the mass lies on some diagonal


def test_last_rows() -> None:
    assert last_rows(10, 3).tolist() == [7, 8, 9]
    assert last_rows(2, 64).tolist() == [0, 1]


@pytest.mark.parametrize(("n", "share"), [(100, 0.05), (97, 0.1), (1000, 0.07), (5, 0.01), (64, 1.0), (50, 0.6)])
def test_strided_rows(n: int, share: float) -> None:
    rows = strided_rows(n, share).tolist()
    assert rows == sorted(set(rows)) and rows[0] >= 0
    assert rows[-1] == n - 1  # the tail is always sampled
    assert len(rows) == max(1, -(-round(share * n * 1e9) // 10**9))
    gaps = {b - a for a, b in pairwise(rows)}
    assert not gaps or max(gaps) - min(gaps) <= 1
