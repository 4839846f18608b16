"""Sparse attention on tiny random-weight transformers of the diffusers library."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saccade.attach.diffusers import BlockMethod, NeighborhoodMethod, SparseProcessor, attach_transformer
from saccade.core import Mass
from tests.methods.static.grids import grid_map

diffusers = pytest.importorskip("diffusers")
GRID, TEXT = (8, 16), 5


@pytest.fixture(scope="module")
def dit():
    """A class-conditional DiT on a 16 x 16 grid of tokens, and a call of it."""
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=32, patch_size=2,
        num_embeds_ada_norm=100, norm_num_groups=2,
    ).eval()  # fmt: skip
    x = torch.randn(1, 4, 32, 32)
    return model, lambda: model(x, timestep=torch.tensor([3]), class_labels=torch.tensor([1])).sample


@pytest.fixture(scope="module")
def flux():
    """Joint attention of text (first) and image tokens, with rotary positions, and a call of it."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    n = GRID[0] * GRID[1]
    ids = torch.stack([torch.zeros(n), torch.arange(n) // GRID[1], torch.arange(n) % GRID[1]], 1)
    inputs = {
        "hidden_states": torch.randn(1, n, 4), "encoder_hidden_states": torch.randn(1, TEXT, 12), "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([0.5]), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip
    return model, lambda: model(**inputs).sample


class _Masked(SparseProcessor):
    """Dense attention under a mask, put where the sparse one goes."""

    def _run(self, q, k, v, scale):
        pairs = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        pairs[TEXT:, TEXT:] = grid_map(GRID, (5, 4), (1, 2), (1, 2), (False, False))
        logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~pairs, -torch.inf)
        return logits.softmax(-1) @ v


@pytest.mark.parametrize("model", ["dit", "flux"])
@torch.no_grad()
def test_opened_equals_the_model_and_leaving_restores_it(model: str, request: pytest.FixtureRequest) -> None:
    net, run = request.getfixturevalue(model)
    grid = (16, 16) if model == "dit" else GRID
    dense, before = run(), [m.processor for m in net.modules() if hasattr(m, "processor")]
    for method in (NeighborhoodMethod(grid=grid, window=None), BlockMethod(grid=grid, budget=1.0, rows=16)):
        with attach_transformer(net, method) as handle:
            opened = run()
        assert handle.calls == 2 and (opened - dense).abs().max() < 1e-5
    assert [m.processor for m in net.modules() if hasattr(m, "processor")] == before
    assert torch.equal(run(), dense)


@torch.no_grad()
def test_neighborhoods_in_joint_attention_are_exact(flux) -> None:
    net, run = flux
    method = NeighborhoodMethod(grid=GRID, window=(5, 4), stride=(1, 2), dilation=(1, 2))
    with attach_transformer(net, method, extra=TEXT) as handle:
        got = run()
    masked = attach_transformer(net, method, extra=TEXT)
    masked.make = lambda inner: _Masked(inner, method, TEXT, "first")
    with masked:
        exact = run()
    assert handle.calls == 2 and (got - exact).abs().max() < 1e-5
    assert (got - run()).abs().max() > 1e-3


@pytest.mark.parametrize("budget", [0.25, 2, Mass(0.5)], ids=str)
@torch.no_grad()
def test_blocks_are_chosen_within_the_budget(dit, budget) -> None:
    net, run = dit
    with attach_transformer(net, BlockMethod(grid=(16, 16), budget=budget, rows=16)) as handle:
        got = run()
    densities = [processor.density for processor in handle.processors]
    # 16 tiles: the best four (two) of each row and its own
    most = {0.25: 5 / 16, 2: 3 / 16}.get(budget, 0.95) if not isinstance(budget, Mass) else 0.95
    assert all(d is not None and 1 / 16 <= d <= most for d in densities)
    assert (got - run()).abs().max() > 1e-4


@torch.no_grad()
def test_only_the_layers_asked_for(dit) -> None:
    net, run = dit
    dense = run()
    with attach_transformer(net, NeighborhoodMethod(grid=(16, 16), window=3), layers=[1]) as handle:
        one = run()
        with pytest.raises(ValueError, match="already attached"), attach_transformer(net, NeighborhoodMethod(grid=(16, 16), window=3)):
            pass
    assert handle.calls == 1 and not torch.equal(one, dense)


@torch.no_grad()
def test_another_grid_is_left_alone_and_seen_to_be(dit) -> None:
    net, run = dit
    dense = run()
    with attach_transformer(net, NeighborhoodMethod(grid=(15, 15), window=3), extra=0) as handle:
        assert torch.equal(run(), dense)
    assert handle.calls == 0


def test_gradients_pass_through(dit) -> None:
    net, run = dit
    net.zero_grad()
    with attach_transformer(net, NeighborhoodMethod(grid=(16, 16), window=3)):
        run().square().mean().backward()
    weight = net.transformer_blocks[0].attn1.to_v.weight
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused(dit) -> None:
    method = NeighborhoodMethod(grid=(16, 16), window=3)
    with pytest.raises(ValueError, match="no attention processors"):
        attach_transformer(nn.Linear(2, 2), method)
    with pytest.raises(ValueError, match="not among the model's 2 attention modules"):
        attach_transformer(dit[0], method, layers=[2])
    with pytest.raises(ValueError, match="extra_side='middle'"):
        attach_transformer(dit[0], method, extra_side="middle")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="window of 17"):
        NeighborhoodMethod(grid=(16, 16), window=17)
