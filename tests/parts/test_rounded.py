"""parts.rounded: the CPU form of tile maxima of rounded logits."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.estimate import tile_maxima
from saccade.parts import rounded
from saccade.parts.rounded import rounded_maxima


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("n_q", "n_k"), [(500, 500), (130, 517), (64, 400)])
@pytest.mark.parametrize(("bits", "group"), [(4, 1), (8, 16)])
def test_same_as_the_general_estimate(monkeypatch: pytest.MonkeyPatch, n_q: int, n_k: int, bits: int, group: int, softcap: float) -> None:
    monkeypatch.setattr(rounded, "ROWS", 200)  # several runs of rows and of keys
    monkeypatch.setattr(rounded, "KEYS", 96)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, n_q, 16, generator=generator, dtype=torch.float64) + 1
    k = torch.randn(2, 2, n_k, 16, generator=generator, dtype=torch.float64) - 1
    lse = torch.randn(2, 6, n_q, generator=generator, dtype=torch.float64)
    tiles = -(-n_q // 64)
    reach = (torch.arange(tiles) * 64 + n_k - n_q - 50).clamp(min=0) // 32 * 32
    found = rounded_maxima(q, k, 64, 32, reach, bits=bits, group=group, relative_to=lse, scale=0.25, softcap=softcap)
    whole = tile_maxima(q, k, 64, 32, bits=bits, group=group, relative_to=lse, scale=0.25, softcap=softcap)
    asked = torch.arange(whole.shape[-1]) * 32 < reach[:, None]
    assert bool(asked.any()) and (found - whole)[..., asked].abs().max() < 1e-12
    assert bool((found[..., ~asked] == -torch.inf).all())
