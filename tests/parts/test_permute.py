"""parts.permute: keys in another order, with their positions."""

from __future__ import annotations

import pytest
import torch

from saccade.ops import attend
from saccade.parts.permute import permute, segment_order


def test_order_falls_inside_segments_and_ties_keep_theirs() -> None:
    importance = torch.tensor([[[0.0, 3.0, 1.0, 2.0, 5.0, 5.0, 9.0, 5.0]]])
    assert segment_order(importance, 4).tolist() == [[[1, 3, 2, 0, 6, 4, 5, 7]]]
    with pytest.raises(ValueError, match="no whole number of segments"):
        segment_order(importance, 3)


@pytest.mark.parametrize("heads", [2, 6])
def test_positions_travel_with_keys_and_values(heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 2, 22, 8, generator=generator), torch.randn(2, 2, 22, 5, generator=generator)
    moved = permute(k, v, segment_order(torch.rand(2, heads, 20, generator=generator), 10))
    assert moved.k.shape == (2, heads, 22, 8) and moved.v.shape == (2, heads, 22, 5)
    for name, source in (("k", k), ("v", v)):
        wide = source.repeat_interleave(heads // 2, 1)
        expected = wide.gather(2, moved.positions.unsqueeze(-1).expand(*moved.positions.shape, source.shape[-1]))
        assert torch.equal(getattr(moved, name), expected)
    assert torch.equal(moved.positions.sort(-1).values, torch.arange(22).expand(2, heads, 22))
    q = torch.randn(2, 6, 22, 8, generator=generator)
    out = attend(q, moved.k, moved.v, k_positions=moved.positions).out
    assert (out - attend(q, k, v).out).abs().max() < 1e-5
