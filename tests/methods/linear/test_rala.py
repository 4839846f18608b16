"""rala: the ranks of the buffer and of the output, and rows that sum to 1."""

from __future__ import annotations

import torch

import saccade


def layer(spec: str = "rala(rotary=False)", seed: int = 0, **sizes: int):
    torch.manual_seed(seed)
    return saccade.mixer(spec, **{"dim": 32, "heads": 4, **sizes}).double()


def effective_rank(x: torch.Tensor) -> float:
    """The exponential of the entropy of the singular values."""
    s = torch.linalg.svdvals(x)
    p = s / s.sum()
    return float((-(p * p.log()).sum()).exp())


@torch.no_grad()
def test_weighted_tokens_raise_the_rank_of_the_buffer():
    """Most tokens are alike (a background), a few differ and are what the queries ask for: their weights grow, and so does the rank."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        k = torch.full((64, 8), -2.0, dtype=torch.float64) + 0.05 * torch.randn(64, 8, dtype=torch.float64, generator=draw)
        k[::8] = 4 * torch.eye(8, dtype=torch.float64) - 1
        v = 5 * torch.randn(8, dtype=torch.float64, generator=draw).expand(64, 8).clone()
        v[::8] = torch.randn(8, 8, dtype=torch.float64, generator=draw)
        q = k[::8].repeat(8, 1)
        weighted, plain = (
            effective_rank(layer(spec).maps(q[None, None], k[None, None])[1][0, 0].mT @ v) for spec in ("rala", "rala(weighted=False)")
        )
        assert weighted > 1.1 * plain


@torch.no_grad()
def test_a_product_with_the_input_raises_the_rank_of_the_output():
    """What heads read has a rank of at most D each; multiplied by a map of the input it has more, up to that of all tokens."""
    made = layer("rala(rotary=False, kernel=0)", heads=1, head_dim=8)
    x = torch.randn(1, 100, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (made.split(y) for y in made.project(x, (10, 10)))
    out = made.read(*made.maps(q, k), v, (10, 10))[0, 0]
    out = out @ torch.randn(8, 24, dtype=torch.float64)  # as many channels as the gate has below
    gate = x[0] @ torch.randn(32, 24, dtype=torch.float64)
    assert torch.linalg.matrix_rank(out) == 8 and torch.linalg.matrix_rank(out * gate) == 24


@torch.no_grad()
def test_rows_sum_to_1_without_rotation_and_tokens_weigh_n_together():
    made = layer()
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 4, 49, 8, dtype=torch.float64, generator=draw) for _ in range(2))
    phi_q, phi_k = made.maps(q, k)
    assert (made.weights(phi_q, phi_k, (7, 7)).sum(-1) - 1).abs().max() < 1e-6
    made.eps = 0.0
    assert (made.weights(phi_q, phi_k, (7, 7)).sum(-1) - 1).abs().max() < 1e-12
    turned = layer("rala")
    assert (turned.weights(phi_q, phi_k, (7, 7)).sum(-1) - 1).abs().max() > 1e-3
    plain = layer("rala(weighted=False)").maps(q, k)
    share = made.importance(*plain)
    assert (share.sum(2) - 49).abs().max() < 1e-12 and (plain[1] * share - phi_k).abs().max() < 1e-12


@torch.no_grad()
def test_all_tokens_are_coupled_through_the_global_query():
    """Another query at one token changes what all others read, which linear attention alone does not."""
    for spec, coupled in (("rala(kernel=0, rotary=False)", True), ("rala(kernel=0, rotary=False, weighted=False)", False)):
        made = layer(spec)
        draw = torch.Generator().manual_seed(3)
        q, k, v = (torch.randn(1, 4, 25, 8, dtype=torch.float64, generator=draw) for _ in range(3))
        other = q.clone()
        other[:, :, 7] += 1
        change = (made.read(*made.maps(other, k), v, (5, 5)) - made.read(*made.maps(q, k), v, (5, 5))).abs().amax((0, 1, 3))
        assert change[7] > 1e-3 and (change[8:].min() > 1e-9) == coupled
