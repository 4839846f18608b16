"""parts.antidiagonal: tile masses from sums along antidiagonals."""

from __future__ import annotations

import pytest
import torch

from saccade.parts import antidiagonal
from saccade.parts.antidiagonal import antidiagonal_mass


@pytest.mark.parametrize("rows", [1, 1 << 22])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_each_reduced_logit_is_a_mean_over_an_antidiagonal(monkeypatch: pytest.MonkeyPatch, rows: int, on_cpu: bool) -> None:
    monkeypatch.setattr(antidiagonal, "ROWS", rows)
    monkeypatch.setattr(antidiagonal.cpu, "HELD", rows)
    monkeypatch.setattr(antidiagonal, "_on_cpu", lambda x: on_cpu)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 30, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 2, 40, 8, generator=generator, dtype=torch.float64)
    seen = torch.rand(4, 5, generator=generator) < 0.7
    seen[1] = False
    found = antidiagonal_mass(q, k, 8, 4, seen, scale=0.3)
    assert found.shape == (2, 4, 4, 5)
    logits = torch.zeros(2, 4, 32, 40, dtype=torch.float64)
    logits[:, :, :30] = 0.3 * q @ k.repeat_interleave(2, 1).mT
    reduced = torch.zeros(2, 4, 8, 10, dtype=torch.float64)
    for a in range(8):
        for b in range(10):
            reduced[:, :, a, b] = sum(logits[:, :, 4 * a + r, 4 * b + 3 - r] for r in range(4)) / 4
    hidden = ~seen.repeat_interleave(2, 0).repeat_interleave(2, 1)
    mass = reduced.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    wanted = mass.unflatten(-1, (5, 2)).sum(-1).unflatten(2, (4, 2)).mean(3)
    assert (found - wanted).abs().max() < 1e-12
    assert torch.allclose(found.sum(-1), seen.any(-1).double().expand(2, 4, 4))


def test_stride_must_divide_the_block() -> None:
    x = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="stride 3 does not divide blocks of 8"):
        antidiagonal_mass(x, x, 8, 3, torch.ones(1, 1, dtype=torch.bool), scale=1.0)
