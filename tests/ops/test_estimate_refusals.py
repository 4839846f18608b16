"""What the estimates refuse, in one sentence each, and that what ran is on record."""

from __future__ import annotations

import pytest
import torch

from saccade.ops import estimate
from saccade.ops.estimate import TileGrid, choose_threshold, choose_top_k, choose_top_p


def tensors(heads: int, kv_heads: int, n_q: int, n_k: int, dim: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, n_q, dim, generator=g, dtype=torch.float64)
    return q, torch.randn(2, kv_heads, n_k, dim, generator=g, dtype=torch.float64) + 0.3


def test_refusals() -> None:
    q, k = tensors(4, 2, 8, 8)
    grid = TileGrid.of(q, k, 4, 4)
    scores = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="2 x 3 tiles, the grid over 8 queries and 8 keys has 2 x 2"):
        choose_top_k(torch.zeros(1, 1, 2, 3), 1, grid)
    with pytest.raises(ValueError, match=r"count=1\.5 is not a number of tiles"):
        choose_top_k(scores, 1.5, grid)
    with pytest.raises(TypeError, match="whole numbers of tiles"):
        choose_top_k(scores, torch.ones(1), grid)
    with pytest.raises(ValueError, match=r"limits of shape \(3,\) do not fit"):
        choose_top_k(scores, torch.ones(3, dtype=torch.int32), grid)
    with pytest.raises(ValueError, match="share=0 is not above 0"):
        choose_top_p(scores, 0, grid)
    with pytest.raises(ValueError, match="sinks=-1"):
        choose_threshold(scores, 0.0, grid, sinks=-1)
    with pytest.raises(TypeError, match="expected a bool mask"):
        choose_threshold(scores, 0.0, grid, forced=scores)
    with pytest.raises(ValueError, match="bits=3 is not 4, 8 or None"):
        estimate.tile_maxima(q, k, 4, 4, bits=3)
    with pytest.raises(ValueError, match="relative_to"):
        estimate.tile_maxima(q, k, 4, 4, relative_to=torch.zeros(8))
    with pytest.raises(ValueError, match="stride 3 does not divide"):
        estimate.pooled_probabilities(q, k, 4, 4, stride=3)
    with pytest.raises(ValueError, match="consecutive causal rows"):
        estimate.row_sums(q, k, torch.arange(8), diagonals=True)
    with pytest.raises(ValueError, match="positions are"):
        estimate.row_sums(q, k, torch.arange(7))
    with pytest.raises(ValueError, match="scale -1 must be positive"):
        estimate.tile_maxima(q, k, 4, 4, scale=-1)
    with pytest.raises(ValueError, match="impl 'cuda' is not one of"):
        estimate.pool_blocks(q, 4, impl="cuda")
    with pytest.raises(ValueError, match="block=0"):
        estimate.pool_blocks(q, 0)
    with pytest.raises(ValueError, match="do not fit queries"):
        estimate.page_bounds(q, k[:, :, :2], k[:, :, :3])
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        estimate.pooled_scores(q[:, :3], k, 4, 4)


def test_what_ran_is_known() -> None:
    q, k = tensors(4, 2, 8, 8)
    estimate.pooled_scores(q, k, 4, 4)
    run = estimate.last_estimate()
    assert (run.op, run.impl, run.n_q, run.n_k) == ("pooled_scores", "reference", 8, 8)
