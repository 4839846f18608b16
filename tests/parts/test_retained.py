from __future__ import annotations

import torch
from tests.parts.test_probe import full_map

from saccade.core import Selection
from saccade.parts.retained import sparsity_degree, worst_row_mass


def test_worst_row_is_the_least_mass_of_any_row() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 50, 8, generator=generator), torch.randn(2, 2, 60, 8, generator=generator)
    selection = Selection.window(50, 60, 9, sinks=2, block_q=4, block_k=1)
    p = full_map(q, k, 8**-0.5)
    expected = (p * selection.dense_mask()).sum(-1).amin(-1)
    assert (worst_row_mass(selection, q, k) - expected).abs().max() < 1e-5
    assert (worst_row_mass(Selection.full(50, 60), q, k) - 1).abs().max() < 1e-5


def test_sparsity_degree_is_what_the_best_pairs_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = 3 * torch.randn(1, 4, 50, 8, generator=generator), torch.randn(1, 2, 60, 8, generator=generator)
    p = full_map(q, k, 8**-0.5)
    for share in (0.5, 0.9):
        best = p.sort(-1, descending=True).values.cumsum(-1)
        needed = ((best < share).sum(-1) + 1).sum(-1)
        visible = sum(range(11, 61))
        assert (sparsity_degree(q, k, share) - (1 - needed / visible)).abs().max() < 2 / visible
    assert (sparsity_degree(q, k, 1.0) == 0).all()
