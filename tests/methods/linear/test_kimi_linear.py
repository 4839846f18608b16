"""kimi-linear: the gated delta rule per channel and its limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import saccade
from saccade.ops.scan import scan


def inputs(n: int = 90) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 16, dtype=torch.float64) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    return q, k, v, -torch.rand(2, 2, n, 16, dtype=torch.float64), torch.rand(2, 2, n, dtype=torch.float64)


def test_equal_channels_are_the_gated_delta_rule():
    q, k, v, g, beta = inputs()
    scalar = g[..., 0]
    channels = scalar.unsqueeze(-1).expand_as(g)
    for a, b in zip(scan(q, k, v, log_decay=channels, beta=beta), scan(q, k, v, log_decay=scalar, beta=beta), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_no_decay_is_deltanet_and_no_write_is_decay_alone():
    q, k, v, g, beta = inputs()
    still = scan(q, k, v, log_decay=torch.zeros_like(g), beta=beta)
    for a, b in zip(still, scan(q, k, v, beta=beta), strict=True):
        assert (a - b).abs().max() < 1e-12
    start = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    _, state = scan(q, k, v, log_decay=g, beta=torch.zeros_like(beta), initial_state=start)
    assert (state - g.sum(2).exp().unsqueeze(-1) * start).abs().max() < 1e-12


def test_the_layers_agree_in_the_same_limits():
    """A layer whose gate never closes is DeltaNet with an output gate; one gate per head equals equal gates for its channels."""
    torch.manual_seed(1)
    x = torch.randn(2, 40, 32, dtype=torch.float64)
    kda = saccade.mixer("kimi-linear", dim=32, heads=4).double()
    plain = saccade.mixer("kimi-linear(gate='none')", dim=32, heads=4).double()
    plain.load_state_dict(kda.state_dict(), strict=False)
    assert (kda(x)[0] - plain(x)[0]).abs().max() > 1e-6
    kda.gate.a_log.data.fill_(-40.0)
    assert (kda(x)[0] - plain(x)[0]).abs().max() < 1e-12
    kda.gate.a_log.data.fill_(0.3)
    one = saccade.mixer("kimi-linear(gate='token')", dim=32, heads=4).double()
    one.load_state_dict({name: value for name, value in kda.state_dict().items() if not name.startswith("gate.")}, strict=False)
    one.gate.a_log.data.fill_(0.3)
    one.gate.project.weight.data.zero_()
    kda.gate.project[1].weight.data.zero_()
    kda.gate.bias.data.fill_(-1.0)
    one.gate.bias.data.fill_(-1.0)
    assert (kda(x)[0] - one(x)[0]).abs().max() < 1e-12


def test_transitions_have_eigenvalues_from_0_to_1():
    _, k, _, g, beta = inputs(20)
    eye = torch.eye(16, dtype=torch.float64)
    for t in range(20):
        key = k[0, 0, t]
        # similar to the symmetric diag(e^(g/2)) (I - beta k k^T) diag(e^(g/2))
        root = torch.diag((g[0, 0, t] / 2).exp())
        values = torch.linalg.eigvalsh(root @ (eye - beta[0, 0, t] * torch.outer(key, key)) @ root)
        assert values.min() >= -1e-12 and values.max() <= 1 + 1e-12


def test_strong_gates_neither_overflow_nor_lose_the_recent():
    q, k, v, g, beta = inputs(200)
    for factor in (20.0, 200.0):
        fast, slow = (scan(q, k, v, log_decay=factor * g, beta=beta, impl=impl)[0] for impl in ("chunked", "reference"))
        assert torch.isfinite(fast).all() and (fast - slow).abs().max() < 1e-11


def test_gates_start_between_almost_nothing_and_a_few_tokens():
    torch.manual_seed(2)
    layer = saccade.mixer("kimi-linear", dim=64, heads=4)
    step = torch.nn.functional.softplus(layer.gate.bias)
    assert step.min() > 0.0009 and step.max() < 0.11
    assert layer.gate.a_log.exp().min() >= 1 and layer.gate.a_log.exp().max() <= 16


def test_wrong_fields_are_refused():
    for spec, message in (("kimi-linear(gate='row')", "is not 'channel'"), ("kimi-linear(rank=0)", "rank of at least 1")):
        with pytest.raises(ValueError, match=message):
            saccade.mixer(spec, dim=32, heads=4)
