"""parts.lsh: angular hashing with Gray-ordered buckets."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from saccade.parts.lsh import angular_buckets, gray_rank


def test_neighbours_in_rank_differ_in_one_bit() -> None:
    for bits in (1, 3, 7, 12):
        codes = torch.arange(1 << bits)
        rank = gray_rank(codes, bits)
        assert torch.equal(rank.sort().values, codes)
        ordered = rank.argsort().tolist()
        assert all((a ^ b).bit_count() == 1 for a, b in pairwise(ordered))


def test_bits_agree_as_often_as_angles_say() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2, 4000, generator=generator)
    for angle in (0.3, 1.0, 2.5):
        pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]])
        signs = pair @ directions > 0
        share = float((signs[0] == signs[1]).float().mean())
        assert abs(share - (1 - angle / math.pi)) < 0.03
    x = torch.randn(2, 3, 50, 2, generator=generator)
    buckets = angular_buckets(x, directions[:, :5])
    assert buckets.shape == (2, 3, 50) and int(buckets.max()) < 32 and len(buckets.unique()) > 5
    # length does not matter, direction does
    assert torch.equal(buckets, angular_buckets(7 * x, directions[:, :5]))
    assert not torch.equal(buckets, angular_buckets(-x, directions[:, :5]))
