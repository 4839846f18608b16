"""linear-log-normal: the spread of softmax's logits, features matched to it, and the local half."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.parts.linear.log_normal import log_variance_fit, matched, row_entropy, spectral_gap, spread, temperature
from saccade.parts.linear.mimicry import linear_weights, softmax_weights


def draws(size: float, d: int = 64, n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(size * torch.randn(1, 1, n, d, generator=generator, dtype=torch.float64) for _ in range(2))  # pyright: ignore[reportReturnType]


def exponential(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, beta = matched(spread(q, None, True), spread(k, None, True), q.shape[-1])
    return (alpha[:, None, None] * q).exp(), (beta[:, None, None] * k).exp()


@pytest.mark.parametrize("size", [0.7, 1.0, 1.5])
def test_softmax_s_logits_spread_as_the_product_of_variances(size: float):
    q, k = draws(size)
    logits = q @ k.mT / 8
    product = float(spread(q, None, True) * spread(k, None, True))
    assert abs(float(logits.var()) / product - 1) < 0.1


@pytest.mark.parametrize("d", [16, 64])
def test_matched_features_spread_alike_at_every_temperature(d: int):
    for size in (1.0, 1.1, 1.3, 1.5):  # the fit is a line and serves variances from about 1 on
        q, k = draws(size, d)
        phi_q, phi_k = exponential(q, k)
        variance = float((phi_q @ phi_k.mT).log().var())
        assert abs(variance / size**4 - 1) < 0.2, (size, variance)
    a, b = log_variance_fit(d)
    assert a > 0 > b


def test_entropy_follows_softmax_and_that_of_elu_does_not():
    found = {"softmax": [], "lln": [], "elu": []}
    for size in (0.9, 1.1, 1.3, 1.5):
        q, k = draws(size)
        found["softmax"].append(row_entropy(softmax_weights(q, k, causal=False)))
        found["lln"].append(row_entropy(linear_weights(*exponential(q, k), causal=False)))
        found["elu"].append(row_entropy(linear_weights(*(torch.nn.functional.elu(x) + 1 for x in (q, k)), causal=False)))
    softmax, lln, elu = (torch.stack(found[name]).flatten() for name in ("softmax", "lln", "elu"))
    assert (lln - softmax).abs().max() < 0.2 * softmax.max(), found
    assert (lln.diff() < 0).all() and (elu > torch.tensor(256.0).log() - 0.3).all(), found


def test_concentration_follows_the_temperature():
    """As the temperature falls, entropy and spectral gap of both softmax and matched features fall with it, row by row of the table."""
    table = []
    for size in (1.0, 1.2, 1.4):
        q, k = draws(size, n=128)
        weights = [softmax_weights(q, k, causal=False), linear_weights(*exponential(q, k), causal=False)]
        table.append([temperature(q, k), *(float(x) for w in weights for x in (row_entropy(w), spectral_gap(w)))])
    table = torch.tensor(table)
    assert (table.diff(dim=0) < 0).all(), table
    assert abs(table[0, 0] - 1) < 0.02
    even = torch.full((4, 4), 0.25)
    assert abs(float(spectral_gap(even)) - 1) < 1e-5 and abs(float(spectral_gap(torch.eye(4)))) < 1e-6
    assert abs(float(row_entropy(even)) - torch.tensor(4.0).log()) < 1e-6


def test_with_one_block_the_local_half_is_softmax():
    torch.manual_seed(2)
    with_blocks, alone = (saccade.mixer(f"linear-log-normal(block={block})", dim=32, heads=4).double() for block in (60, 0))
    alone.load_state_dict(with_blocks.state_dict())
    x = torch.randn(2, 60, 32, dtype=torch.float64)
    q, k, v, _ = alone.project(x, {}, alone.whole(x))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    exact = alone.o_proj(out.transpose(1, 2).flatten(2))
    assert (with_blocks(x)[0] - (alone(x)[0] + exact) / 2).abs().max() < 1e-12


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_layer_is_its_weights_and_does_not_overflow(bidirectional: bool):
    torch.manual_seed(3)
    layer = saccade.mixer(f"linear-log-normal(block=0, bidirectional={bidirectional})", dim=32, heads=4).double()
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    alpha, beta = layer.alpha, layer.beta
    if bidirectional:
        alpha, beta = matched(q.var((0, 2, 3), correction=0), k.var((0, 2, 3), correction=0), 8)
    weights = linear_weights((alpha[:, None, None] * q).exp(), (beta[:, None, None] * k).exp(), causal=not bidirectional)
    assert (layer(x)[0] - layer.o_proj((weights @ v).transpose(1, 2).flatten(2))).abs().max() < 1e-10
    if not bidirectional:
        layer.beta.fill_(1e4)
        assert torch.isfinite(layer.float()(x.float())[0]).all()


def test_measuring_sets_what_a_causal_layer_uses():
    torch.manual_seed(4)
    layer = saccade.mixer("linear-log-normal", dim=32, heads=4, kv_heads=2)
    x = 3 * torch.randn(4, 40, 32)
    before = layer(x)[0]
    layer.measure(x)
    q, k, _, _ = layer.project(x, {}, layer.whole(x))
    alpha, beta = matched(q.var((0, 2, 3), correction=0), k.var((0, 2, 3), correction=0), 8)
    assert torch.allclose(layer.alpha, alpha, rtol=1e-4) and torch.allclose(layer.beta, beta, rtol=1e-4)
    assert (layer(x)[0] - before).abs().max() > 1e-4
    assert {"alpha", "beta"} <= set(layer.state_dict())  # saved with the weights
    valid = torch.zeros(4, 40, dtype=torch.bool)
    valid[:, :10] = True
    layer.measure(x, valid)
    again = saccade.mixer("linear-log-normal", dim=32, heads=4, kv_heads=2)
    again.load_state_dict(layer.state_dict())
    again.measure(x[:, :10])
    assert torch.allclose(again.alpha, layer.alpha)


def test_a_wrong_field_is_refused():
    with pytest.raises(ValueError, match="0 for no blocks"):
        saccade.mixer("linear-log-normal(block=-1)", dim=32, heads=4)
