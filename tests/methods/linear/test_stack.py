"""Stacks of blocks, alone and inside a mixer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.core import Call, MixerShape, TokenMixer
from saccade.methods.stack import Stack


class Nested(TokenMixer):
    """A stack as a mixer: what two token rates and memories with layers of their own are built on."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.stack = Stack(["deltanet", "softmax(window=8)", "softmax"], dim=shape.dim, heads=shape.heads, width=24)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        y, states = self.stack(x, Stack.unpack(past), keep=call.keep)
        return y, Stack.pack(states)

    def naive(self, x: Tensor) -> Tensor:
        for block in self.stack.blocks:
            x = x + block.mixer.naive(block.norm(x))
            x = x + block.feed_forward(block.feed_norm(x))
        return x


@torch.no_grad()
def test_a_stack_inside_a_mixer_keeps_its_states_there():
    torch.manual_seed(0)
    layer, x = Nested(MixerShape(dim=32, heads=4)).double(), torch.randn(3, 40, 32, dtype=torch.float64)
    expected = layer.naive(x)
    outs, state = [], None
    for part in x.split([20, 1, 1, 18], dim=1):
        y, state = layer(part, state)
        outs.append(y)
    assert (torch.cat(outs, 1) - expected).abs().max() < 1e-10
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[0, :10], valid[1, 35:] = False, False
    y, state = layer(x, valid=valid)
    assert (y[:1, 10:] - layer.naive(x[:1, 10:])).abs().max() < 1e-10
    after = torch.randn(3, 1, 32, dtype=torch.float64)
    more = layer(after.flip(0), state.reorder(torch.tensor([2, 1, 0])))[0]
    assert (more[2] - layer.naive(torch.cat([x[:1, 10:], after[:1]], 1))[:, -1]).abs().max() < 1e-10


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        Stack([], dim=32, heads=4)
    with pytest.raises(ValueError, match="1 states for a stack of 2"):
        Stack(["softmax"] * 2, dim=32, heads=4)(torch.zeros(1, 3, 32), [None])
