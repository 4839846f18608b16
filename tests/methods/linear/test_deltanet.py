"""deltanet: what the delta rule remembers and what linear attention does not, and the WY form behind its chunks."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.ops.scan import scan


def rule(q, k, v, beta):
    return scan(q, k, v, beta=beta, scale=1.0)[0]


def test_orthonormal_keys_are_overwritten_exactly():
    """Reading a key gives the last value written under it, however often it was written; linear attention gives the sum."""
    torch.manual_seed(0)
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    order = torch.tensor([0, 3, 5, 3, 0, 3, 7])
    k = keys[order][None, None]
    v = torch.randn(1, 1, 7, 4, dtype=torch.float64)
    beta = torch.ones(1, 1, 7, dtype=torch.float64)
    _, state = scan(k, k, v, beta=beta, scale=1.0)
    last = {int(key): v[0, 0, i] for i, key in enumerate(order)}
    for key, value in last.items():
        assert torch.allclose(keys[key] @ state[0, 0], value, atol=1e-12)
    added = scan(k, k, v, scale=1.0)[1]
    assert torch.allclose(keys[3] @ added[0, 0], v[0, 0, order == 3].sum(0), atol=1e-12)


def test_a_state_is_a_product_of_householder_matrices():
    torch.manual_seed(1)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 9, 6, dtype=torch.float64), dim=-1)
    v, beta = torch.randn(1, 1, 9, 5, dtype=torch.float64), 2 * torch.rand(1, 1, 9, dtype=torch.float64)
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for t in range(9):
        turn = torch.eye(6, dtype=torch.float64) - beta[0, 0, t] * torch.outer(k[0, 0, t], k[0, 0, t])
        expected = turn @ expected + beta[0, 0, t] * torch.outer(k[0, 0, t], v[0, 0, t])
    assert torch.allclose(scan(k, k, v, beta=beta, scale=1.0)[1][0, 0], expected, atol=1e-12)


def test_chunks_equal_the_recurrence_behind_a_state():
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 150, 16, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    beta, start = torch.rand(2, 3, 150, dtype=torch.float64), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    slow, fast = (scan(q, k, v, beta=beta, initial_state=start, impl=impl) for impl in ("reference", "chunked"))
    for a, b in zip(slow, fast, strict=True):
        assert (a - b).abs().max() < 1e-11


def test_it_recalls_as_many_pairs_as_a_head_has_channels():
    """Associative recall, without training: random keys in 64 channels, 48 pairs rewritten once; the layer's rule reads the newest."""
    torch.manual_seed(3)
    keys = torch.linalg.qr(torch.randn(64, 64)).Q[:48]
    values = torch.nn.functional.normalize(torch.randn(96, 64), dim=-1)
    k, v = torch.cat([keys, keys])[None, None], values[None, None]
    queries = torch.cat([k, keys[None, None]], dim=2)
    pad = torch.zeros(1, 1, 48, 64)
    read = {}
    for name, beta in (("delta", torch.cat([torch.ones(1, 1, 96), torch.zeros(1, 1, 48)], -1)), ("sum", None)):
        out = scan(queries, torch.cat([k, pad], 2), torch.cat([v, pad], 2), beta=beta, scale=1.0)[0][0, 0, 96:]
        read[name] = float(((out @ values.T).argmax(-1) == torch.arange(48, 96)).float().mean())
    assert read["delta"] == 1.0 and read["sum"] < 0.9


def test_the_layer_normalises_keys_and_bounds_strengths():
    torch.manual_seed(4)
    layer = saccade.mixer("deltanet(negative=True)", dim=32, heads=4)
    x = torch.randn(2, 10, 32)
    q, k, _v, _ = layer.project(x, {}, layer.whole(x))
    q, k = layer.features(q, k, layer.whole(x))
    assert torch.allclose(k.norm(dim=-1), torch.ones(2, 4, 10), atol=1e-5)
    beta = layer.strength(100 * x)
    assert 1.5 < beta.max() <= 2 and beta.min() >= 0
    assert saccade.mixer("deltanet", dim=32, heads=4).strength(100 * x).max() <= 1


def test_a_wrong_width_is_refused():
    with pytest.raises(ValueError, match="give a width in tokens"):
        saccade.mixer("deltanet(conv=-1)", dim=32, heads=4)
