"""lawcat: hedgehog where nothing is convolved or forgotten, weights that sum to one, outputs that stay bounded far out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.methods import build_mixer


def layer(spec: str) -> Any:
    torch.manual_seed(0)
    return saccade.mixer(spec, dim=32, heads=4, kv_heads=2).double()


def tokens(n: int = 40) -> Tensor:
    return torch.randn(2, n, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_without_forgetting_it_is_hedgehog():
    ours, other = layer("lawcat"), layer("hedgehog(bias=False)")
    other.load_state_dict({name: ours.state_dict()[name] for name in other.state_dict()})
    assert float((ours(tokens())[0] - other(tokens())[0]).abs().max()) > 1e-3
    ours.gate.project[1].bias.fill_(1e9)
    assert float((ours(tokens())[0] - other(tokens())[0]).abs().max()) < 1e-12
    # and the convolution does something once it is no identity
    ours.qk_conv.weight[:, 0] = 0.5
    assert float((ours(tokens())[0] - other(tokens())[0]).abs().max()) > 1e-3


@torch.no_grad()
def test_weights_sum_to_one_whatever_the_gates_and_far_out():
    mixer = layer("lawcat(temperature=2.0, bias=True)")
    mixer.qk_conv.weight.add_(0.3 * torch.randn(mixer.qk_conv.weight.shape, dtype=torch.float64))
    mixer.v_proj.weight.zero_()
    mixer.v_proj.bias.fill_(1.0)
    y, _ = mixer(tokens(400))
    assert float((y - mixer.o_proj.weight.sum(-1)).abs().max()) < 1e-10


@pytest.mark.parametrize("fields", ["conv=0", "rank=0", "features=0", "temperature=0.0", "theta=-1.0"])
def test_wrong_fields_are_refused(fields: str):
    with pytest.raises(ValueError, match=fields):
        build_mixer(f"lawcat({fields})")
