"""Random tiles: as many pairs as asked for, drawn anew for every head, the same whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade.core import HeadLayout, LayerContext, Selection
from saccade.methods.baseline.random_tiles import RandomTiles


def context(layer: int = 0, seed: int = 0) -> LayerContext:
    layout = HeadLayout(query_heads=4, kv_heads=2, head_dim=8, value_dim=8)
    return LayerContext(layer=layer, layers=4, layout=layout, scale=1.0, attend=lambda q, *_, **__: q, seen=512, seed=seed)


def tensors(n_q: int, n_k: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(batch, 4, n_q, 8), torch.zeros(batch, 2, n_k, 8), torch.zeros(batch, 2, n_k, 8)


def chosen(method: RandomTiles, n_q: int = 512, n_k: int = 512, batch: int = 1, **facts: int) -> Selection:
    return method.select(context(**facts), *tensors(n_q, n_k, batch))


@pytest.mark.parametrize("density", [0.1, 0.2, 0.45, 0.8])
@pytest.mark.parametrize(("n_q", "n_k"), [(512, 512), (500, 500), (200, 700)])
def test_what_runs_has_the_density_that_was_asked_for(density: float, n_q: int, n_k: int) -> None:
    found = chosen(RandomTiles(density=density, block=8), n_q, n_k)
    assert found.density() == pytest.approx(density, rel=0.06) and found.density() <= density


def test_first_and_own_keys_are_always_read_and_nothing_else_is_certain() -> None:
    method, heads, reads = RandomTiles(density=0.2, block=16, sinks=20), 4, []
    for seed in range(6):
        mask = chosen(method, seed=seed).coverage()[0]
        tile = torch.arange(32)
        assert mask[:, 2:, :32].all(), "20 sinks are two tiles of 16"
        assert mask[:, tile, 16 * tile].all() and mask[:, tile, 16 * tile + 15].all()
        reads.append(mask[:, -1, 32:496])
    together = torch.stack(reads).float().mean((0, 1))
    assert together.max() < 0.6 and 0.05 < together.mean() < 0.2, "what is always read comes out of the density"
    assert len({tuple(head.tolist()) for head in reads[0]}) == heads, "heads draw for themselves"


def test_draws_are_fixed_by_seed_and_layer_and_the_same_for_every_row() -> None:
    method = RandomTiles(density=0.3, block=16)
    one = chosen(method)
    assert torch.equal(one.starts, chosen(method).starts)
    assert not torch.equal(one.coverage(), chosen(method, layer=1).coverage())
    assert not torch.equal(one.coverage(), chosen(method, seed=1).coverage())
    assert chosen(method, batch=3).batch == 1


def test_what_is_always_read_may_be_more_than_the_density() -> None:
    least = chosen(RandomTiles(density=0.001, block=64))
    tiles = 512 // 64
    assert int(least.start_counts.max()) == 2 and least.density() == pytest.approx((tiles * 64 * 65 / 2 + 7 * 64 * 64) / (512 * 513 / 2))
    assert chosen(RandomTiles(density=1.0)).density() == 1.0


def test_everything_is_dense_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 200, 8), torch.randn(1, 2, 200, 8), torch.randn(1, 2, 200, 8)
    dense = saccade.attention(q, k, v, method="dense")
    assert torch.allclose(saccade.attention(q, k, v, method="random-tiles(density=1.0)"), dense, atol=1e-6)
    assert (saccade.attention(q, k, v, method="random-tiles(density=0.2, block=16)") - dense).abs().max() > 0.01


@pytest.mark.parametrize(("fields", "says"), [
    ({"density": 0}, "density=0"), ({"density": 1.5}, "above 0 and at most 1"), ({"block": 0}, "block=0"), ({"sinks": -1}, "sinks=-1"),
])  # fmt: skip
def test_bad_fields_are_refused(fields: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RandomTiles(**fields)
