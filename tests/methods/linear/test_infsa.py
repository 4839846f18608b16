"""infsa: paths of all lengths, the direction that the pooled query finds, one output for all tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import saccade
from saccade.methods.linear.infsa import all_paths, token_graph


def layer(spec: str = "infsa", seed: int = 0):
    torch.manual_seed(seed)
    return saccade.mixer(spec, dim=32, heads=4).double()


def heads(n: int = 40):
    draw = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, n, 8, dtype=torch.float64, generator=draw) for _ in range(3))


@torch.no_grad()
def test_partial_sums_of_paths_reach_the_inverse():
    """|A|_F is 1 (up to eps), so the sum over path lengths converges for gamma below 1, each further hop by that factor at least."""
    q, k, _ = heads()
    a = token_graph(q, k, eps=0.0)
    assert a.min() >= 0 and (torch.linalg.matrix_norm(a) - 1).abs().max() < 1e-12
    for gamma in (0.3, 0.95):
        closed, hop, total = all_paths(a, gamma), gamma * a, torch.zeros_like(a)
        for t in range(1, 400):
            total, hop = total + hop, hop @ (gamma * a)
            if t in (5, 20):
                assert torch.linalg.matrix_norm(closed - total).max() <= gamma ** (t + 1) / (1 - gamma) + 1e-12
        assert (closed - total).abs().max() < 1e-8 * closed.abs().max() + 1e-8


@torch.no_grad()
def test_the_closure_counts_visits_of_an_absorbing_chain():
    """Absorbed in every row with probability 1 - gamma sum_j A_ij: from anywhere, the chain ends somewhere with probability 1."""
    q, k, _ = heads()
    a = token_graph(q, k) / 3  # rows of less than 1 in sum
    absorbed = 1 - 0.9 * a.sum(-1, keepdim=True)
    assert absorbed.min() > 0
    visits = all_paths(a, 0.9) + torch.eye(40, dtype=torch.float64)
    assert visits.min() >= 0 and (visits @ absorbed - 1).abs().max() < 1e-12


@torch.no_grad()
def test_the_pooled_query_finds_the_dominant_direction():
    """On tokens of low rank whose queries and keys agree: the cosine with the main eigenvector of A, by power iteration."""
    torch.manual_seed(2)
    base = torch.rand(1, 1, 1, 8, dtype=torch.float64) + 0.5
    k = base * (1 + torch.rand(2, 4, 60, 1, dtype=torch.float64)) + 0.15 * torch.randn(2, 4, 60, 8, dtype=torch.float64)
    q = k + 0.05 * torch.randn(2, 4, 60, 8, dtype=torch.float64)
    a = token_graph(q, k)
    vector = torch.ones(2, 4, 1, 60, dtype=torch.float64)
    for _ in range(200):
        vector = F.normalize(vector @ a, dim=-1)
    assert F.cosine_similarity(layer().shares(q, k), vector, dim=-1).min() > 0.98


@torch.no_grad()
def test_queries_are_pooled_by_their_lengths():
    """One long query among many short ones that point elsewhere decides what is read."""
    q = torch.zeros(1, 4, 5, 8, dtype=torch.float64)
    q[..., :4, 0], q[..., 4, 1] = 0.1, 3.0
    k = torch.eye(8, dtype=torch.float64).expand(1, 4, 8, 8)
    shares = layer().shares(q, k)[0, 0, 0]
    # lengths times queries: four of 0.1 x 0.1 along channel 0, one of 3 x 3 along channel 1
    assert (shares[:2] - torch.tensor([0.04, 9.0], dtype=torch.float64) / 9.04).abs().max() < 1e-4 and not shares[2:].any()


@torch.no_grad()
def test_every_token_gets_the_same_output_in_the_linear_form():
    x = torch.randn(2, 30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = layer()(x)[0]
    assert (y - y[:, :1]).abs().max() == 0 and (y[0] - y[1]).abs().max() > 1e-3
    assert (layer("infsa(form='pure')")(x)[0][:, 0] - layer("infsa(form='pure')")(x)[0][:, 1]).abs().max() > 1e-6
    shares = layer().shares(*list(heads())[:2])
    assert shares.min() >= 0 and (shares.sum(-1) - 1).abs().max() < 1e-4


@torch.no_grad()
def test_pure_is_one_hop_and_few_discounts_make_the_closure_one_hop_too():
    x = torch.randn(2, 300, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    pure = layer("infsa(form='pure')")
    assert (pure(x)[0] - pure.naive(x)).abs().max() < 1e-12  # in blocks of 256 queries
    closure = layer("infsa(form='closure')")
    closure.load_state_dict(pure.state_dict())
    for one in (pure, closure):
        one.discount.fill_(-12.0)
        one.o_proj.bias.zero_()
    assert (closure(x)[0] - pure(x)[0]).abs().max() < 1e-4 * pure(x)[0].abs().max()


def test_the_discount_starts_at_095_and_learns():
    made = layer()
    assert (made.discount.sigmoid() - 0.95).abs().max() < 1e-7
    made(torch.randn(1, 9, 32, dtype=torch.float64))[0].square().sum().backward()
    assert made.discount.grad.abs().max() > 0


def test_an_empty_graph_gives_finite_gradients():
    made = layer("infsa(form='pure')")
    with torch.no_grad():
        made.k_proj.weight.zero_()
        made.k_proj.bias.zero_()
    x = torch.randn(1, 9, 32, dtype=torch.float64, requires_grad=True)
    made(x)[0].sum().backward()
    assert torch.isfinite(x.grad).all()


def test_wrong_fields_are_refused():
    for spec, message in (("form='katz'", "is not 'linear'"), ("rho=1.0", "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            layer(f"infsa({spec})")
