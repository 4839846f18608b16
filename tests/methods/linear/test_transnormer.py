"""transnormer: gradients with and without the denominator, blocks, and how far attention spreads."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.methods.linear.transnormer import DiagAttention
from saccade.parts.linear.blocks import attend_blocks, block_oracle
from saccade.parts.linear.both_ways import BothWays
from saccade.parts.linear.mimicry import linear_weights


def steepest(weigh, s: torch.Tensor) -> float:
    """The largest |d p / d s| over entries."""
    return float(torch.autograd.functional.jacobian(weigh, s).abs().max())


def test_the_denominator_makes_gradients_unbounded():
    generator = torch.Generator().manual_seed(0)
    softmax, linear = [], []
    for size in (1.0, 0.1, 0.01):
        s = size * (0.5 + torch.rand(12, generator=generator, dtype=torch.float64))
        softmax.append(steepest(lambda s: s.softmax(0), s))
        linear.append(steepest(lambda s: s / s.sum(), s))
    assert max(softmax) <= 0.25
    # |dp / ds| = p (1 - p) / s: as the scores shrink it grows as their inverse
    assert linear[2] > 5 * linear[1] > 25 * linear[0]
    pair = torch.tensor([0.001, 0.001], dtype=torch.float64)
    assert abs(steepest(lambda s: s / s.sum(), pair) - 1 / (4 * 0.001)) < 1e-6


def test_the_output_norm_keeps_gradients_in_bounds():
    """The derivative by the scores of one row, through the norm of the layer: the same bound however small the scores are."""
    torch.manual_seed(1)
    layer = saccade.mixer("transnormer(part='norm')", dim=16, heads=1).double()
    v = torch.randn(12, 16, dtype=torch.float64)

    def read(s: torch.Tensor) -> torch.Tensor:
        return layer.normaliser.after((s @ v)[None, None, None], layer.whole(v[None]), None)

    steep = [steepest(read, torch.rand(12, dtype=torch.float64) * size) * max(size, 1e-3) for size in (1.0, 0.1, 0.01, 1e-4, 1e-6)]
    assert max(steep) < 5  # at most a constant over the size, and over sqrt(eps) = 1e-3 below that


def test_norm_attention_has_no_denominator():
    torch.manual_seed(2)
    for more, causal in (("", True), (", bidirectional=True", False)):
        layer = saccade.mixer(f"transnormer(part='norm'{more})", dim=32, heads=4).double()
        x = torch.randn(2, 70, 32, dtype=torch.float64)
        call = layer.whole(x)
        q, k, v, _ = layer.project(x, {}, call)
        q, k = (torch.nn.functional.elu(y) + 1 for y in (q, k))
        w = (q @ k.mT).tril() if causal else q @ k.mT
        out = (w @ v).transpose(1, 2).flatten(2)
        out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # over the heads together
        assert (layer(x)[0] - layer.o_proj(out)).abs().max() < 1e-10


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_block_as_long_as_the_sequence_is_softmax(bidirectional: bool):
    torch.manual_seed(3)
    layer = saccade.mixer(f"transnormer(part='diag', block=70, bidirectional={bidirectional})", dim=32, heads=4).double()
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=not bidirectional)
    assert (layer(x)[0] - layer.o_proj(out.transpose(1, 2).flatten(2))).abs().max() < 1e-12


@pytest.mark.parametrize("weights", ["softmax", "relu"])
def test_blocks_do_not_overlap(weights: str):
    torch.manual_seed(4)
    layer = saccade.mixer(f"transnormer(part='diag', block=16, blocks='{weights}', bidirectional=True)", dim=32, heads=4).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    assert (layer(x)[0] - layer.naive(x)).abs().max() < 1e-12  # the last block has 2 tokens
    other = x.clone()
    other[:, 20] += 1
    change = (layer(other)[0] - layer(x)[0]).abs().amax((0, 2))
    assert change[16:32].min() > 0 and change[:16].max() == 0 and change[32:].max() == 0
    valid = torch.ones(2, 50, dtype=torch.bool)
    valid[0, 40:] = False
    assert (layer(x, valid=valid)[0][0, :40] - layer(x[:1, :40])[0][0]).abs().max() < 1e-12


def test_blocks_with_shared_keys_and_wider_values():
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, h, 40, d, generator=generator, dtype=torch.float64) for h, d in ((4, 6), (2, 6), (2, 10)))
    call = saccade.mixer("transnormer", dim=8, heads=4).whole(torch.zeros(2, 40, 8))
    out, _ = attend_blocks(q, k, v, {}, call, block=12)
    assert (out - block_oracle(q, k, v, block=12)).abs().max() < 1e-12
    assert attend_blocks(q[:, :, :1], k[:, :, :1], v[:, :, :1], {}, call, block=12)[0].shape == (2, 4, 1, 10)


def test_blocks_keep_attention_near_and_linear_attention_spreads_it():
    """The mass within a tenth of the sequence around each query."""
    generator = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 1, 640, 16, generator=generator) for _ in range(2))
    near = (torch.arange(640)[:, None] - torch.arange(640)).abs() <= 64
    spread = linear_weights(torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, causal=False)[0, 0]
    eye = torch.eye(640)[None, None]
    local = block_oracle(q, k, eye, block=64, bidirectional=True)[0, 0]
    assert (local * near).sum(-1).mean() > 0.99 and (spread * near).sum(-1).mean() < 0.3


def test_the_first_half_of_the_layers_is_local():
    kinds = [type(saccade.mixer("transnormer", dim=32, heads=4, layer=layer, layers=5)) for layer in range(5)]
    assert kinds == [DiagAttention] * 3 + [BothWays] * 2


def test_wrong_fields_are_refused():
    for spec, message in (("transnormer(part='dia')", "'auto', 'norm' or 'diag'"), ("transnormer(block=0)", "at least 1 token")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
