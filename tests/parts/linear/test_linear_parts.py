"""Feature maps, gates, normalisers, convolutions, windows and merges, each against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saccade.core import Call, MixerShape
from saccade.parts.linear import (
    Recurrent,
    ShortConv,
    bidir_linear,
    feature_map,
    gated_sum,
    last_tokens,
    mean_of_norms,
    partial_softmax,
    shared_denominator,
)
from saccade.parts.linear.gates import CumulativeSoftmaxGate, Gate, SigmoidGate, StabilisedGate
from saccade.parts.linear.normalise import LengthPower, MaxStabilised, Normaliser, OutputNorm, RowSum, Together

N = 70


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def facts(b: int, n: int, start: int = 0, lengths: Tensor | None = None) -> Call:
    begin = torch.full((b,), start)
    return Call(positions=begin[:, None] + torch.arange(n), start=begin, lengths=lengths)


# -- feature maps ----------------------------------------------------------------------------------------------------------


NAMES = ["identity", "elu+1", "relu", "silu", "softmax", "unit", "exp", "taylor2", "power", "hedgehog", "silu|unit"]


@pytest.mark.parametrize("name", NAMES)
def test_maps_say_how_wide_they_are(name: str):
    phi = feature_map(name, heads=2, dim=6).double()
    x = rand(3, 2, 5, 6)
    y = phi(x)
    assert y.shape == (3, 2, 5, phi.width(6)) and torch.isfinite(y).all()
    if name in ("elu+1", "relu", "softmax", "exp", "power", "hedgehog"):
        assert y.min() >= 0
    if name.endswith("unit"):
        assert torch.allclose(y.norm(dim=-1), torch.ones(3, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_second_order_taylor_scores(symmetric: bool):
    phi = feature_map("taylor2", symmetric=symmetric)
    q, k = rand(1, 1, 9, 7), rand(1, 1, 9, 7, seed=1)
    s = q @ k.mT / 7**0.5
    assert torch.allclose(phi(q) @ phi(k).mT, 1 + s + s * s / 2, atol=1e-12)
    assert phi.width(7) == (1 + 7 + 28 if symmetric else 1 + 7 + 49)


def test_focused_maps_keep_lengths_and_turn_to_the_largest_channel():
    x = rand(1, 1, 20, 8).abs()
    y = feature_map("power", power=3.0)(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert (y.amax(-1) / y.norm(dim=-1) > x.amax(-1) / x.norm(dim=-1) - 1e-9).all()


def test_a_hedgehog_has_both_signs_and_one_map_per_head():
    phi = feature_map("hedgehog", heads=2, dim=4, activation="exp").double()
    x = rand(1, 2, 3, 4)
    assert torch.allclose(phi(x), torch.cat([x.exp(), (-x).exp()], -1))
    phi.weight.data[1] *= 2
    assert torch.allclose(phi(x)[:, 1], torch.cat([(2 * x).exp(), (-2 * x).exp()], -1)[:, 1])


def test_unknown_maps_are_refused():
    for name in ("tanh", "silu|tanh"):
        with pytest.raises(ValueError, match="'tanh' is not known: use one of identity"):
            feature_map(name)
    with pytest.raises(ValueError, match="'relu' of a hedgehog"):
        feature_map("hedgehog", heads=1, dim=4, activation="relu")


# -- gates -----------------------------------------------------------------------------------------------------------------


def recurrent(gate: Gate | None = None, normaliser: Normaliser | None = None, **options: object) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(MixerShape(dim=16, heads=2, head_dim=8), gate=gate, normaliser=normaliser, **options).double()


def stepped(layer: Recurrent, x: Tensor) -> Tensor:
    outs, state = [], None
    for t in range(x.shape[1]):
        y, state = layer(x[:, t : t + 1], state)
        outs.append(y)
    return torch.cat(outs, 1)


@torch.no_grad()
def test_cumulative_softmax_keys_give_the_mean_of_values_under_each_channel_s_softmax():
    layer = recurrent(CumulativeSoftmaxGate(), key_dim=8)
    layer.k_proj.weight.data *= 20  # logits up to 50 and more
    x = rand(2, N, 16)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    assert k.abs().max() > 30
    causal = torch.ones(N, N, dtype=torch.bool).tril()
    logits = k.mT.unsqueeze(-2).masked_fill(~causal, float("-inf"))  # (B, H, F, t, s)
    expected = torch.einsum("bhtf,bhfts,bhsv->bhtv", q, logits.softmax(-1), v)
    assert (layer(x)[0] - layer.finish(expected, x)).abs().max() < 1e-10
    assert (stepped(layer, x) - layer(x)[0]).abs().max() < 1e-10
    valid = torch.ones(2, N, dtype=torch.bool)
    valid[0, :20], valid[1, 60:] = False, False
    y, state = layer(x, valid=valid)
    alone = layer(x[:1, 20:])
    assert (y[:1, 20:] - alone[0]).abs().max() < 1e-10
    assert (state.values["s"][0] - alone[1].values["s"][0]).abs().max() < 1e-10


@torch.no_grad()
def test_a_stabilised_gate_and_its_floor_are_the_unstabilised_ones():
    """mLSTM, token by token and without any maximum, in float64."""
    layer = recurrent(StabilisedGate(16, 2), MaxStabilised(), scale=None)
    layer.gate.project.weight.data *= 4
    x = rand(2, N, 16)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    write, forget = layer.gate.project(x).mT.unflatten(1, (2, 2)).unbind(1)
    state, total, outs = torch.zeros(2, 2, 8, 8).double(), torch.zeros(2, 2, 8).double(), []
    for t in range(N):
        f, i = forget[..., t].sigmoid(), write[..., t].exp()
        state = f[..., None, None] * state + i[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
        total = f[..., None] * total + i[..., None] * k[:, :, t]
        read = (q[:, :, t] / 8**0.5).unsqueeze(-2)
        norm = torch.maximum((read @ total.unsqueeze(-1)).abs(), torch.ones(1).double())
        outs.append((read @ state) / norm)
    expected = layer.finish(torch.cat(outs, 2), x)
    assert (layer(x)[0] - expected).abs().max() < 1e-10 and (stepped(layer, x) - expected).abs().max() < 1e-10
    assert (layer.naive(x) - expected).abs().max() < 1e-10
    layer.gate.project.bias.data[:2] += 500  # exp alone overflows float32 here
    assert torch.isfinite(layer.float()(x.float())[0]).all()
    with pytest.raises(ValueError, match="use StabilisedGate"):
        recurrent(None, MaxStabilised())(x)


@torch.no_grad()
def test_a_sigmoid_gate_has_a_temperature_and_a_floor():
    x = rand(2, 10, 16)
    plain, floored = SigmoidGate(16, 2, features=8).double(), SigmoidGate(16, 2, temperature=1.0, floor=0.9).double()
    assert plain(x, x, None, facts(2, 10)).log_decay.shape == (2, 2, 10, 8)
    raw = plain.project(x)
    assert torch.allclose(plain(x, x, None, facts(2, 10)).log_decay[:, 1, :, 2].exp() ** 16, raw[..., 10].sigmoid())
    decay = floored(x, x, None, facts(2, 10)).log_decay.exp()
    assert decay.shape == (2, 2, 10) and decay.min() >= 0.9 and decay.max() < 1


# -- normalisers -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_row_sums_make_means_of_values():
    layer = recurrent(normaliser=RowSum(), q_map="elu+1", k_map="elu+1")
    layer.v_proj.weight.data.zero_()
    layer.v_proj.bias = nn.Parameter(torch.ones(16, dtype=torch.float64))
    y = layer(rand(2, N, 16))[0]
    assert torch.allclose(y, layer.o_proj(torch.ones(2, N, 16).double()))
    assert (stepped(layer, rand(2, N, 16)) - y).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("on", ["values", "output"])
def test_a_length_power_runs_from_sums_to_means(on: str):
    layer = recurrent(normaliser=LengthPower(2, on=on), q_map="unit", k_map="unit")
    x = rand(2, N, 16)
    q, k, v, _ = layer.project(x, {}, layer.whole(x))
    q, k = layer.features(q, k, layer.whole(x))
    n = torch.arange(1.0, N + 1, dtype=torch.float64)
    for m, power in ((-40.0, n**0), (40.0, n**1)):
        layer.normaliser.m.data.fill_(m)
        weights = (q @ k.mT).tril() / (power if on == "values" else power[:, None])
        assert (layer(x)[0] - layer.finish(weights @ v, x)).abs().max() < 1e-10
        assert (stepped(layer, x) - layer(x)[0]).abs().max() < 1e-10


def test_output_norms_cover_a_head_or_all_of_them():
    out, call = 7 * rand(2, 3, 5, 8), facts(2, 5)
    head, all_of_them = OutputNorm(3, 8).double(), OutputNorm(3, 8, over="all", weight=False)
    assert torch.allclose(head.after(out, call, None).square().mean(-1), torch.ones(2, 3, 5).double(), atol=1e-4)
    assert torch.allclose(all_of_them.after(out, call, None).square().mean((1, 3)), torch.ones(2, 5).double(), atol=1e-4)
    both = Together(LengthPower(3), OutputNorm(3, 8)).double()
    assert torch.equal(both.after(out, call, None), head.after(out, call, None)) and both.total is None
    assert Together(RowSum(), OutputNorm(3, 8)).total == "sum"


# -- convolutions and last tokens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_short_convolution_is_causal_and_goes_on_from_its_tail(width: int):
    torch.manual_seed(0)
    conv = ShortConv(6, width, activation=None, bias=True).double()
    conv.bias.data.normal_()
    x = rand(2, 9, 6)
    expected = torch.stack([
        conv.bias + sum(conv.weight[:, j] * x[:, t - width + 1 + j] for j in range(width) if t - width + 1 + j >= 0) for t in range(9)
    ], 1)  # fmt: skip
    y, tail = conv(x)
    assert torch.allclose(y, expected, atol=1e-12) and tail.shape == (2, width - 1, 6)
    first, kept = conv(x[:, :5])
    parts = [first]
    for t in range(5, 9):
        part, kept = conv(x[:, t : t + 1], kept)
        parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-12) and torch.equal(kept, tail)
    with pytest.raises(ValueError, match="give at least 1"):
        ShortConv(6, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 0])])
def test_a_convolution_of_several_is_that_of_all_together(bias: bool, n: int, lengths: Tensor | None):
    conv, tail = ShortConv(9, 4, bias=bias).double(), rand(2, 3, 9)
    x = rand(2, n, 9, seed=1)
    for before in (None, tail):
        y, after = conv(x, before, lengths)
        parts, own = conv.each(x.split([4, 2, 3], -1), before, lengths)
        assert [part.shape[2] for part in parts] == [4, 2, 3]
        assert (torch.cat(parts, -1) - y).abs().max() < 1e-12 and torch.equal(own, after)


def test_last_tokens_of_rows_of_different_lengths():
    before, new = torch.arange(3.0).view(1, 3, 1).repeat(3, 1, 1), torch.arange(3.0, 7.0).view(1, 4, 1).repeat(3, 1, 1)
    assert last_tokens(before, new, None)[0, :, 0].tolist() == [4, 5, 6]
    assert last_tokens(before, new, torch.tensor([0, 1, 4]))[..., 0].tolist() == [[0, 1, 2], [1, 2, 3], [4, 5, 6]]


# -- both ways, and merges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", ["sum", "mean", "affine", "divisive", "none"])
def test_bidirectional_attention_equals_its_weights_written_out(normaliser: str):
    q, k, v = rand(2, 3, 12, 5).exp(), rand(2, 3, 12, 5, seed=1).exp(), rand(2, 3, 12, 4, seed=2)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[0, 9:] = False
    out = bidir_linear(q, k, v, normaliser, real=real)
    for row, n in ((0, 9), (1, 12)):
        s = q[row, :, :n] @ k[row, :, :n].mT
        total = s.sum(-1, keepdim=True)
        weights = {
            "sum": s / total, "mean": s / n, "affine": (1 + 1 / total) * s - total / n, "divisive": s - total / n + 1 / n, "none": s,
        }[normaliser]  # fmt: skip
        assert torch.allclose(out[row, :, :n], weights @ v[row, :, :n], atol=1e-9)
        if normaliser in ("sum", "affine", "divisive"):
            assert torch.allclose(weights.sum(-1), torch.ones(3, n).double())
    assert not out[0, :, 9:].any()
    with pytest.raises(ValueError, match="'rows' is not known"):
        bidir_linear(q, k, v, "rows")


def test_a_shared_denominator_counts_every_key_once():
    """With phi such that linear scores are exactly exp(logit), exact and linear parts over disjoint keys make up softmax."""
    q, k, v = rand(1, 4, 6, 5), rand(1, 2, 10, 5, seed=1), rand(1, 2, 10, 3, seed=2)
    logits = (q @ k.repeat_interleave(2, 1).mT) / 5**0.5
    mask = torch.arange(10) >= 4
    exact = partial_softmax(q, k, v, mask)
    rest = (logits - exact.top).exp().masked_fill(mask, 0.0)
    out = shared_denominator(exact, rest @ v.repeat_interleave(2, 1), rest.sum(-1, keepdim=True))
    assert torch.allclose(out, logits.softmax(-1) @ v.repeat_interleave(2, 1), atol=1e-12)
    nothing = partial_softmax(q, k, v, torch.zeros(10, dtype=torch.bool))
    assert not nothing.out.any() and torch.isinf(nothing.top).all()


def test_gated_sums_and_means_of_norms():
    a, b = rand(2, 3, 8), 100 * rand(2, 3, 8, seed=1)
    gate = rand(2, 3, 1, seed=2).sigmoid()
    assert torch.allclose(gated_sum([a, b], [gate, 1 - gate]), gate * a + (1 - gate) * b)
    ones = torch.ones(8).double()
    mean = mean_of_norms([a, b], [ones, 0 * ones])
    assert torch.allclose(mean, a / a.square().mean(-1, keepdim=True).sqrt() / 2, atol=1e-5)
    with pytest.raises(ValueError, match="one weight for each output"):
        gated_sum([a, b], [gate])


@torch.no_grad()
def test_keys_shared_by_heads_work_with_gates_made_from_them():
    torch.manual_seed(0)
    layer = Recurrent(MixerShape(dim=16, heads=4, kv_heads=2), gate=CumulativeSoftmaxGate(), conv=4, rotary="before").double()
    x = rand(2, N, 16)
    assert (layer(x)[0] - layer.naive(x)).abs().max() < 1e-10 and (stepped(layer, x) - layer.naive(x)).abs().max() < 1e-10
