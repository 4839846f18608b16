"""How far the output moves when entries go: the closed form is the change itself."""

from __future__ import annotations

import pytest
import torch
from tests.cache.single import random_qkv
from torch import Tensor

from saccade.parts.output_error import joint_output_error, output_error


def attention(sharp: float = 1.0, n: int = 40) -> tuple[Tensor, Tensor]:
    """Weights of one query `(2, 2, n)` and the values."""
    q, k, v = random_qkv(n, batch=2, query_heads=2, sharp=sharp)
    return (q[:, :, -1:] @ k.mT / 8**0.5).softmax(-1).squeeze(2), v


def without(weights: Tensor, values: Tensor, gone: Tensor) -> Tensor:
    """The change of the output when attention is computed anew without some entries, `(B, H)`."""
    left = weights * ~gone
    left = left / left.sum(-1, keepdim=True)
    return ((weights - left).unsqueeze(2) @ values).squeeze(2).norm(dim=-1)


@pytest.mark.parametrize("sharp", [0.5, 3.0])
def test_one_entry_moves_the_output_by_its_error(sharp: float) -> None:
    weights, values = attention(sharp)
    errors = output_error(7.0 * weights, values)  # scores need not sum to 1
    for j in range(weights.shape[-1]):
        gone = torch.zeros_like(weights, dtype=torch.bool)
        gone[..., j] = True
        assert (errors[..., j] - without(weights, values, gone)).abs().max() < 1e-6


def test_several_entries_move_it_by_the_joint_error() -> None:
    weights, values = attention(2.0)
    for seed in range(5):
        gone = torch.rand(weights.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        assert (joint_output_error(weights, values, gone) - without(weights, values, gone)).abs().max() < 1e-9


def test_entries_that_are_gone_count_nothing() -> None:
    weights, values = attention()
    alive = torch.ones_like(weights, dtype=torch.bool)
    alive[..., 5:20] = False
    left = torch.cat([weights[..., :5], weights[..., 20:]], -1)
    rest = torch.cat([values[:, :, :5], values[:, :, 20:]], 2)
    for fast in (False, True):
        whole, part = output_error(weights, values, alive, fast=fast), output_error(left, rest, fast=fast)
        assert (torch.cat([whole[..., :5], whole[..., 20:]], -1) - part).abs().max() < 1e-12
        assert (whole[..., 5:20] == 0).all()


def test_equal_values_cost_nothing() -> None:
    weights, values = attention()
    assert output_error(weights, values[:, :, :1].expand_as(values)).abs().max() < 1e-12


def test_one_entry_with_all_the_weight_stays_finite() -> None:
    scores = torch.zeros(1, 1, 5)
    values = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output_error(scores, values), torch.zeros(1, 1, 5))
    scores[..., 2] = 3.0
    for fast in (False, True):
        errors = output_error(scores, values, fast=fast)
        assert torch.isfinite(errors).all() and (errors >= 0).all()
    assert output_error(scores, values, fast=True).argmax() == 2


def test_the_mean_of_the_values_orders_entries_much_alike() -> None:
    """Spearman correlation of CAOTE and FastCAOTE is at least 0.8 (section 5 of the paper)."""
    weights, values = attention(1.0, n=400)
    a, b = (output_error(weights, values, fast=fast).argsort(-1).argsort(-1).double() for fast in (False, True))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    assert ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) > 0.8).all()
