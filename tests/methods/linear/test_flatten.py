"""flatten: the focused map, the rank that the convolution restores, positions, reduced keys."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import saccade
from saccade.parts.linear.features import feature_map


def layer(spec: str = "flatten", seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, "max_length": 64, **sizes}).double()


def tokens(n: int = 49) -> torch.Tensor:
    return torch.randn(2, n, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_power_keeps_lengths_and_turns_to_the_largest_channels():
    """Pairs that lean to the same channel come closer as the power grows, others move apart."""
    torch.manual_seed(0)
    x = torch.rand(200, 32, dtype=torch.float64) + 0.01
    for p in (1.0, 3.0, 8.0):
        assert (feature_map("power", power=p, eps=0.0)(x).norm(dim=-1) / x.norm(dim=-1) - 1).abs().max() < 1e-13
    assert (feature_map("power", power=1.0, eps=0.0)(x) - x).abs().max() < 1e-14
    a, b = x[:100], x[100:].clone()
    same = a.argmax(-1) == 0
    a[:, 0], b[:50, 0], b[50:, 1] = 2.0, 2.0, 2.0
    assert not same.all()
    cosines = []
    for p in (1.0, 2.0, 3.0, 6.0):
        phi = feature_map("power", power=p)
        cosines.append(F.cosine_similarity(phi(a), phi(b), dim=-1))
    for c, d in pairwise(cosines):
        assert d[:50].mean() > c[:50].mean() and d[50:].mean() < c[50:].mean()


@torch.no_grad()
def test_rows_are_means_and_lengths_go_over_all_channels():
    made = layer()
    made.scale.normal_()
    x = tokens()
    q, k, _v = (made.split(y) for y in made.project(x, (7, 7)))
    phi_q, phi_k = made.maps(q, k)
    made.eps = 0.0  # over all channels, the features of some heads are as small as the guard
    weights = made.weights(phi_q, phi_k, (7, 7))
    assert weights.min() >= 0 and (weights.sum(-1) - 1).abs().max() < 1e-12
    joined = F.relu(made.project(x, (7, 7))[0] / F.softplus(made.scale)) + 1e-6
    assert (phi_q.square().sum((1, 3)).sqrt() - joined.norm(dim=-1)).abs().max() < 1e-12
    alone = layer("flatten(over='head')").maps(q, k)[0]
    assert (alone - layer().maps(q, k)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_the_convolution_restores_the_rank():
    """Attention of one head has rank of at most D; with the convolution, as a matrix on the values, it has more."""
    made = layer()
    q, k, _ = (made.split(y) for y in made.project(tokens(), (7, 7)))
    weights = made.weights(*made.maps(q, k), (7, 7))[0, 0]
    each = torch.eye(49, dtype=torch.float64).unsqueeze(-1).expand(-1, -1, 32)  # every place alone, as values
    made.local.conv.bias.zero_()
    near = made.local(each.contiguous(), (7, 7))[..., 0].mT
    assert torch.linalg.matrix_rank(weights) <= 8 < torch.linalg.matrix_rank(weights + near)


@torch.no_grad()
def test_the_local_branch_is_added_and_shared_by_the_heads():
    made, plain = layer(), layer("flatten(kernel=0)")
    plain.load_state_dict(made.state_dict(), strict=False)
    v = made.project(tokens(), (7, 7))[2]
    assert (made(tokens())[0] - plain(tokens())[0] - made.local(v, (7, 7)) @ made.o_proj.weight.mT).abs().max() < 1e-12
    assert made.local.conv.weight.shape == (8, 1, 5, 5)


@torch.no_grad()
def test_reduced_keys_read_a_smaller_map():
    made, x = layer("flatten(reduce=2, grid=(6, 8))"), tokens(48)
    q, k, v = made.project(x, (6, 8))
    assert q.shape[1] == 48 and k.shape[1] == v.shape[1] == 12 == len(made.position)
    y = made(x)[0]
    assert (y - made.naive(x)).abs().max() < 1e-12
    other = x.clone()
    other[:, 9] += 1
    assert ((made.project(other, (6, 8))[1] - k).abs().amax((0, 2)) > 1e-9).nonzero().tolist() == [[0]]  # the first of 3 x 4


def test_what_does_not_fit_is_refused():
    for spec, sizes, message in (
        ("flatten", {"max_length": None}, "give grid="), ("flatten(power=0.5)", {}, "at least 1"),
        ("flatten(over='row')", {}, "is not 'all'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            layer(spec, **sizes)
    with pytest.raises(ValueError, match="81 keys are more than the 64 learned positions"):
        layer()(tokens(81))
    assert layer("flatten(positions=False)", max_length=None)(tokens(81))[0].shape == (2, 81, 32)
