"""Principal directions from second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.pca import dims_for, principal_basis, second_moment


def stretched(n: int, shares: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys `(2, 3, n, D)` with these standard deviations along the columns of a random rotation, which is returned too."""
    g = torch.Generator().manual_seed(seed)
    dim = len(shares)
    turn = torch.linalg.qr(torch.randn(3, dim, dim, generator=g, dtype=torch.float64))[0]
    plain = torch.randn(2, 3, n, dim, generator=g, dtype=torch.float64) * torch.tensor(shares, dtype=torch.float64)
    return plain @ turn.mT, turn


def test_planted_directions_are_found_in_order() -> None:
    keys, turn = stretched(4000, [8.0, 4.0, 2.0, 1.0, 0.5])
    basis, explained = principal_basis(second_moment(keys))
    assert basis.shape == (3, 5, 5) and basis.dtype == explained.dtype == torch.float32
    alike = (basis.double() * turn).sum(-2).abs()  # cosine of each column with the planted one
    assert float(alike.min()) > 0.99
    want = torch.tensor([64.0, 16.0, 4.0, 1.0, 0.25])
    assert float((explained - want.cumsum(0) / want.sum()).abs().max()) < 0.01
    assert bool((explained.diff(dim=-1) > 0).all()) and float((explained[:, -1] - 1).abs().max()) < 1e-6


def test_bases_are_orthogonal_and_signed() -> None:
    keys, _ = stretched(300, [3.0, 3.0, 1.0, 0.0, 0.0, 0.0])  # equal and empty directions
    basis, explained = principal_basis(second_moment(keys))
    eye = torch.eye(6)
    assert float((basis.mT @ basis - eye).abs().max()) < 1e-5
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    assert bool((largest > 0).all())
    assert float((explained[:, 2:] - 1).abs().max()) < 1e-6
    again, _ = principal_basis(second_moment(keys).clone())
    assert torch.equal(basis, again)


def test_moments_of_parts_add_up_and_heads_stay_apart() -> None:
    keys, _ = stretched(100, [3.0, 2.0, 1.0])
    parts = [second_moment(piece) for piece in (*keys[:1].split(30, dim=2), keys[1:])]
    assert float((sum(parts) - second_moment(keys)).abs().max()) < 1e-9
    assert float((second_moment(keys[:, 1:2])[0] - second_moment(keys)[1]).abs().max()) < 1e-9
    assert second_moment(keys.bfloat16()).dtype == torch.float64


def test_the_mean_is_not_subtracted() -> None:
    keys, _ = stretched(500, [1.0, 1.0, 1.0, 1.0])
    keys = keys + 5 * torch.nn.functional.normalize(torch.ones(4, dtype=torch.float64), dim=0)
    basis, explained = principal_basis(second_moment(keys))
    assert float((basis[:, :, 0] - 0.5).abs().max()) < 0.05
    assert float(explained[:, 0].min()) > 0.8


def test_fewest_dims_for_a_share() -> None:
    explained = torch.tensor([[0.5, 0.8, 0.9, 1.0], [0.6, 0.7, 0.95, 1.0]])
    assert [dims_for(explained, share) for share in (0.4, 0.5, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0)] == [1, 1, 2, 3, 3, 4, 4, 4]


def test_keys_without_any_variance() -> None:
    basis, explained = principal_basis(torch.zeros(1, 4, 4))
    assert float((basis.mT @ basis - torch.eye(4)).abs().max()) < 1e-6
    assert bool(explained.isfinite().all()) and dims_for(explained, 0.9) == 4
