"""mega: the moving average as a convolution and as a recurrence, chunks, gates and the two elementwise functions."""

from __future__ import annotations

import math

import pytest
import torch

import saccade
from saccade.methods.hybrid.mega import laplace
from saccade.parts.linear.ema import DampedEMA
from saccade.parts.linear.fft_conv import fft_convolve


def layer(spec: str):
    torch.manual_seed(0)
    made = saccade.mixer(spec, dim=16, heads=1).double()
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return made


def tokens(n: int) -> torch.Tensor:
    return torch.randn(2, n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_the_kernel_equals_the_recurrence():
    torch.manual_seed(0)
    ema, x = DampedEMA(16, 8).double(), tokens(300)
    slow = ema.one_by_one(x)
    y, state = ema(x)
    assert (y - slow).abs().max() < 1e-12
    first, state_1 = ema(x[:, :130])
    second, state_2 = ema(x[:, 130:], state_1)
    assert (torch.cat([first, second], 1) - slow).abs().max() < 1e-12 and (state_2 - state).abs().max() < 1e-12
    assert (fft_convolve(x, ema.kernel(300, torch.float64)) + ema.omega * x - slow).abs().max() < 1e-12
    rate = ema.rates(torch.float64)[1].exp()
    assert rate.min() > 0 and rate.max() < 1


@torch.no_grad()
@pytest.mark.parametrize("attention", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("bias", ["rotary", "table"])
def test_a_chunk_as_long_as_the_sequence_is_attention_over_all(attention: str, bias: str):
    """Against the formula, written out with a bias for every pair."""
    mixer, x, n = layer(f"mega(chunk=40, attention={attention!r}, bias={bias!r}, features=2)"), tokens(40), 40
    q, k, v, gates = mixer.gated.enter(x, torch.nn.functional.silu(mixer.ema.one_by_one(x)))
    out = torch.zeros_like(v)
    for i in range(n):
        pairs = torch.stack([mixer.bias(torch.tensor([[i - j]]), torch.float64)[0, 0] for j in range(i + 1)])
        scores = torch.einsum("bz,bjz->bj", q[:, i], k[:, : i + 1])
        if attention == "softmax":
            weights = (scores / math.sqrt(q.shape[-1]) + pairs).softmax(-1)
        else:
            scores = scores / (i + 1) + pairs
            weights = scores.clamp(min=0) ** 2 if attention == "relu2" else laplace(scores)
        out[:, i] = torch.einsum("bj,bjh->bh", weights, v[:, : i + 1])
    assert (mixer(x)[0] - mixer.gated.leave(out, x, gates)).abs().max() < 1e-12


@torch.no_grad()
def test_only_the_average_crosses_a_chunk():
    """What an earlier chunk holds reaches a later one through the average alone: with no memory in it, through nothing."""
    mixer, x = layer("mega(chunk=16, features=2)"), tokens(40)
    other = x.clone()
    other[:, 3] += 1
    assert (mixer(other)[0][:, 16:] - mixer(x)[0][:, 16:]).abs().max() > 1e-6
    mixer.ema.delta.fill_(40)
    mixer.ema.alpha.fill_(40)  # r = 0: the average is the token
    assert (mixer(other)[0][:, 16:] - mixer(x)[0][:, 16:]).abs().max() < 1e-12
    assert (mixer(other)[0][:, 3:16] - mixer(x)[0][:, 3:16]).abs().amax((0, 2)).min() > 1e-9


@torch.no_grad()
def test_with_the_update_gate_shut_a_block_is_the_identity():
    mixer, x = layer("mega"), tokens(20)
    mixer.gated.in_proj.weight[:16] = 0
    mixer.gated.in_proj.bias[:16] = -1e3
    assert torch.equal(x + mixer(x)[0], x)


@torch.no_grad()
def test_values_are_of_the_tokens_and_not_of_their_average():
    mixer, x = layer("mega"), tokens(20)
    v = mixer.gated.enter(x, torch.zeros_like(x))[2]
    assert torch.equal(v, mixer.gated.enter(x, x)[2])


def test_laplace_touches_the_squared_relu_and_stays_below_one():
    point = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    value = laplace(point)
    slope = torch.autograd.grad(value, point)[0]
    assert abs(float(value.detach()) - 0.5) < 1e-12 and abs(float(slope) - math.sqrt(2)) < 1e-12
    spread = laplace(torch.linspace(-1.5, 2.5, 101, dtype=torch.float64))
    assert spread.min() > 0 and spread.max() < 1


@torch.no_grad()
def test_a_rotary_bias_depends_on_the_distance_alone():
    bias = layer("mega").bias
    i = torch.arange(12)
    found = bias(i[:, None] - i, torch.float64)
    turned = [bias.rotary(x.expand(1, 1, 12, -1), i[None])[0, 0] for x in (bias.rows, bias.cols)]
    assert (found - turned[0] @ turned[1].T).abs().max() < 1e-12


@pytest.mark.parametrize("fields", ["attention='mean'", "bias='none'", "chunk=0", "features=0", "expand=0", "narrow=0", "narrow=3"])
def test_wrong_fields_are_refused(fields: str):
    with pytest.raises(ValueError, match="even head_dim" if fields == "narrow=3" else fields.split("=")[0]):
        saccade.mixer(f"mega({fields})", dim=16, heads=1)
