"""parts.hilbert: tokens of a grid along a Hilbert curve."""

from __future__ import annotations

import pytest
import torch

from saccade.ops.estimate import block_statistics
from saccade.parts.hilbert import hilbert_order


@pytest.mark.parametrize("shape", [(16,), (8, 8), (32, 32), (4, 4, 4), (8, 8, 8)])
def test_steps_along_the_curve_go_to_neighbours(shape: tuple[int, ...]) -> None:
    order = hilbert_order(shape)
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape))[order]
    assert int((places[1:] - places[:-1]).abs().sum(-1).max()) == 1
    assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_smallest_square_by_hand() -> None:
    assert hilbert_order((2, 2)).tolist() in ([0, 1, 3, 2], [0, 2, 3, 1])


@pytest.mark.parametrize("shape", [(5, 7), (3, 10, 6), (1, 9)])
def test_other_grids_are_visited_once(shape: tuple[int, ...]) -> None:
    order = hilbert_order(shape)
    assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_blocks_along_the_curve_are_more_alike_than_rows() -> None:
    """A smooth video: the self-similarity of blocks of 64 tokens rises."""
    shape = (8, 16, 32)
    noise = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool3d(noise, 5, stride=1, padding=2, count_include_pad=False)
    tokens = smooth.flatten(2).mT.unsqueeze(1)
    likeness = [float(block_statistics(x, 64).similarity.mean()) for x in (tokens, tokens[:, :, hilbert_order(shape)])]
    assert likeness[1] > 1.5 * likeness[0], likeness


@pytest.mark.parametrize("shape", [(), (0, 3), (2.0, 2), (True, 4)])
def test_wrong_grids_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sides of a grid"):
        hilbert_order(shape)
