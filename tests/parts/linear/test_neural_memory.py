"""The memory that learns while it is read: its chunks against one token after the other, its gradients against autograd."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from saccade.parts.linear.neural_memory import Memory, MemoryRule, Rates, gradients, learn, learn_one, network, unroll

RULES = [
    MemoryRule(depth=1), MemoryRule(depth=2, expand=3), MemoryRule(depth=3, expand=2, residual=True),
    MemoryRule(loss="mean", residual=True),
]  # fmt: skip


def drawn(rule: MemoryRule, n: int = 11, momentum: bool = True, forget: bool = True) -> tuple[Tensor, Tensor, Tensor, Rates, Memory]:
    """q of 2 heads for each of 3 memories, k, v, rates, and a memory in the middle of its chunk."""
    torch.manual_seed(0)
    d = 6
    q, k, v = (torch.randn(2, 3, *more, n, d, dtype=torch.float64) for more in ((2,), (), ()))
    theta, eta, keep = torch.randn(3, 2, 3, n, dtype=torch.float64)
    rates = Rates(0.3 * theta.sigmoid(), logsigmoid(eta) if momentum else None, logsigmoid(keep + 2) if forget else None)
    widths = [d, *[rule.expand * d] * (rule.depth - 1), d]
    shapes = [(2, 3, into, out) for into, out in pairwise(widths)]
    memory = Memory(*([0.4 * torch.randn(shape, dtype=torch.float64) for shape in shapes] for _ in range(3)))
    return normalize(q, dim=-1), normalize(k, dim=-1), v, rates, memory


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("momentum", "forget"), [(True, True), (False, True), (True, False), (False, False)])
def test_many_tokens_equal_the_recursion_at_the_same_base(rule: MemoryRule, momentum: bool, forget: bool):
    q, k, v, rates, memory = drawn(rule, momentum=momentum, forget=forget)
    outs, now = [], memory
    for t in range(q.shape[3]):
        own = rates.part(t, t + 1)
        out, now = learn_one(q[..., t : t + 1, :], k[:, :, t : t + 1], v[:, :, t : t + 1], own, now, rule)
        outs.append(out)
    fast, end = learn(q, k, v, rates, memory, rule)
    assert (fast - torch.cat(outs, 3)).abs().max() < 1e-11
    for mine, theirs in zip((*end.weights, *end.speed), (*now.weights, *now.speed), strict=True):
        assert (mine - theirs).abs().max() < 1e-11
    assert (end.weights[0] - memory.weights[0]).abs().max() > 0.1 and end.base is memory.base


@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_is_an_outer_product(rule: MemoryRule):
    _, k, v, _, memory = drawn(rule)
    found = gradients(k, v, memory.base, rule)
    for t in (0, 7):
        base = [x.clone().requires_grad_() for x in memory.base]
        square = (network(k[:, :, t : t + 1], base, rule.residual) - v[:, :, t : t + 1]).square()
        loss = square.sum() if rule.loss == "sum" else square.mean(-1).sum()
        for (a, d), expected in zip(found, torch.autograd.grad(loss, base), strict=True):
            assert (a[:, :, t, :, None] * d[:, :, t, None] - expected).abs().max() < 1e-11


def test_coefficients_are_those_of_the_two_recurrences():
    _, _, _, rates, _ = drawn(RULES[0], n=5)
    assert rates.log_eta is not None and rates.log_keep is not None
    eta, keep, steps = rates.log_eta.exp(), rates.log_keep.exp(), unroll(rates)
    for source in ("W", "S", 0, 3):
        s = torch.full((2, 3), float(source == "S"), dtype=torch.float64)
        w = torch.full((2, 3), float(source == "W"), dtype=torch.float64)
        for t in range(5):
            s = eta[..., t] * s + float(source == t)
            w = keep[..., t] * w + s
            mine = {"W": steps.weights, "S": steps.speed}[source] if isinstance(source, str) else steps.tokens[..., source]
            assert (mine[..., t] - w).abs().max() < 1e-13
        if source != "W":
            assert ((steps.last_speed if source == "S" else steps.last_tokens[..., source]) - s).abs().max() < 1e-13


def test_what_cannot_be_is_refused():
    cases: list[dict[str, Any]] = [{"depth": 0}, {"expand": 0}, {"chunk": 0}, {"conv": -1}, {"max_step": 0.0}, {"loss": "max"}]
    for given in cases:
        with pytest.raises(ValueError, match=next(iter(given))):
            MemoryRule(**given)
