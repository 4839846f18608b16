"""SinkLoRA (sinklora, 2406.05678): its limits, sinks in every group, no leak, and the task that only sinks solve."""

from __future__ import annotations

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv
from tests.methods.static.learners import accuracy
from tests.methods.static.test_longlora import HEADS, dense, group_map, loss_gradients
from torch import Tensor

import saccade
from saccade.methods import build
from saccade.methods.static.longlora import LongLoRA
from saccade.methods.static.sinklora import SinkLoRA
from saccade.parts.static import CachePlan


def run(method, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return method.attend(context(q, k, v), q, k, v)


def sink_map(n: int, size: int, shift: int, sinks: int, wrapped: bool = True) -> Tensor:
    return (group_map(n, size, shift, wrapped) | (torch.arange(n) < sinks)).tril()


def test_limits() -> None:
    q, k, v = qkv(64)
    assert torch.equal(run(SinkLoRA(shifted=0.5, sinks=0), q, k, v), run(LongLoRA(), q, k, v))
    blocks = masked_dense(q, k, v, group_map(64, 16, 0, False))
    assert (run(SinkLoRA(shifted=0.0, sinks=0), q, k, v) - blocks).abs().max() < 1e-12
    assert (run(SinkLoRA(groups=1), q, k, v) - dense(q, k, v)).abs().max() < 1e-12


@pytest.mark.parametrize("sinks", [0, 1, 4, 9, 30])
@pytest.mark.parametrize(("n", "n_q"), [(64, 64), (57, 57), (57, 21)])
def test_groups_and_sinks_equal_the_masked_form(n: int, n_q: int, sinks: int) -> None:
    """Also sinks that fill half a group, or more than one: none counts twice."""
    q, k, v = qkv(n)
    method, size = SinkLoRA(sinks=sinks), -(-n // 4)
    pairs = torch.stack([sink_map(n, size, shift, sinks) for shift in (0, 0, 0, size // 2)])
    part = q[:, :, -n_q:]
    listed = method.select(context(part, k, v), part, k, v).dense_mask()[0]
    assert torch.equal(listed, pairs[:, -n_q:])
    assert (run(method, part, k, v) - masked_dense(q, k, v, pairs)[:, :, -n_q:]).abs().max() < 1e-12


def test_gradients_equal_those_of_the_mask() -> None:
    tensors = qkv(48, grad=True)
    pairs = torch.stack([sink_map(48, 12, shift, 4) for shift in (0, 0, 0, 6)])
    ours = loss_gradients(lambda q, k, v: run(SinkLoRA(), q, k, v), tensors)
    theirs = loss_gradients(lambda q, k, v: masked_dense(q, k, v, pairs), tensors)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_nothing_leaks_from_the_future() -> None:
    """As printed, sinks see everything: here not even they see what comes later."""
    for t in (0, 2, 20, 47):
        q, k, v = qkv(48, grad=True)
        gradients = torch.autograd.grad(run(SinkLoRA(), q, k, v)[:, :, : t + 1].pow(2).sum(), (q, k, v))
        assert all(not g[:, :, t + 1 :].any() for g in gradients)


@pytest.mark.slow
def test_sinks_solve_what_groups_alone_do_not() -> None:
    """Say the first token at every position: one layer with sinks learns it, groups alone know it in their first group only."""
    n, size = 32, 8

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, 8, (16, n), generator=generator)
        return ids, ids[:, :1].expand(-1, n)

    kept = accuracy(f"sinklora(group={size}, sinks=1, wrapped=False)", batch, steps=120, ids=8, out=8, n=n)
    without = accuracy(f"sinklora(group={size}, sinks=0, wrapped=False)", batch, steps=120, ids=8, out=8, n=n)
    assert kept.min() > 0.9
    assert without[:4].min() > 0.9 and without[size:].max() < 0.4


def test_the_tuned_model_is_served_with_heavy_hitters() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 97, (1, 120), generator=torch.Generator().manual_seed(0))
    with saccade.attach(model, cache="h2o(budget=0.25)") as handle:
        out = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert handle.stats().prefill_density == 1.0
        assert max(max(x) for x in handle.stats().kept) < 60
    assert out.shape == (1, 126)


def test_what_a_cache_would_have_to_keep() -> None:
    n = 64
    method = SinkLoRA(group=16, wrapped=False, shifted=0.5)
    pairs = torch.stack([sink_map(n, 16, shift, 4, False) for shift in (0, 8)])
    plan = CachePlan(method.pattern(n, HEADS), 2)
    assert plan.evictable
    for t in range(n - 1):
        kept = plan.keep(torch.arange(t + 1).expand(1, 2, -1), t)[0]
        assert not (pairs[:, t + 1 :, : t + 1].any(1) & ~kept).any()
    assert plan.size(31).tolist() == [4, 8 + 4]


def test_fields_are_checked() -> None:
    for spec, message in (
        ("sinklora(sinks=-1)", "sinks=-1"), ("sinklora(groups=0)", "groups=0"), ("sinklora(shifted=-0.1)", "share of heads"),
    ):
        with pytest.raises(ValueError, match=message):
            build(spec)
