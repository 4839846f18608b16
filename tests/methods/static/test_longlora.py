"""LongLoRA (longlora, 2309.12307): shifted groups against rolling and masking, reach, gradients, and what a cache may drop."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv
from torch import Tensor

import saccade
from saccade.core import HeadLayout
from saccade.methods import build
from saccade.methods.static.longlora import LongLoRA
from saccade.parts.static import CachePlan

HEADS = HeadLayout(query_heads=4, kv_heads=2, head_dim=8, value_dim=8)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked_dense(q, k, v, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril())


def rolled(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """The paper's way: roll the second half of the heads by half a group, attend in groups, roll back; the mask from true positions."""
    n, size = q.shape[2], q.shape[2] // groups
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    half, place = q.shape[1] // 2, torch.arange(n)

    def grouped(q: Tensor, k: Tensor, v: Tensor, shift: int) -> Tensor:
        q, k, v = (x.roll(-shift, 2).unflatten(2, (groups, size)) for x in (q, k, v))
        at = place.roll(-shift).view(groups, size)
        hidden = at.unsqueeze(1) > at.unsqueeze(2)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ v).flatten(2, 3).roll(shift, 2)

    plain, shifted = (grouped(q[:, h], k[:, h], v[:, h], s) for h, s in ((slice(half), 0), (slice(half, None), size // 2)))
    return torch.cat([plain, shifted], 1)


def group_map(n: int, size: int, shift: int, wrapped: bool) -> Tensor:
    """Which row reads which, from borders alone: `(n, n)` bool."""
    borders = [b for b in range(shift, n, size) if b]
    number = torch.tensor([sum(b <= i for b in borders) for i in range(n)])
    pairs = number.unsqueeze(1) == number
    if wrapped and shift:
        pairs |= (number == number.max()).unsqueeze(1) & (torch.arange(n) < shift)
    return pairs.tril()


def loss_gradients(run, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    out = run(*tensors)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * upstream).sum(), tensors)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_equals_rolling_with_true_positions_forward_and_backward(groups: int) -> None:
    tensors = qkv(48, grad=True)
    method = LongLoRA(groups=groups)
    ours = loss_gradients(lambda q, k, v: method.attend(context(q, k, v), q, k, v), tensors)
    theirs = loss_gradients(lambda q, k, v: rolled(q, k, v, groups), tensors)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))
    if groups == 1:
        assert (ours[0] - dense(*tensors)).abs().max() < 1e-12


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(("n", "n_q"), [(48, 48), (61, 61), (61, 37), (3, 3)])
def test_any_length_equals_the_masked_form(n: int, n_q: int, wrapped: bool) -> None:
    q, k, v = qkv(n)
    method, size = LongLoRA(wrapped=wrapped), math.ceil(n / 4)
    pairs = torch.stack([group_map(n, size, shift, wrapped) for shift in (0, 0, size // 2, size // 2)])
    part = q[:, :, -n_q:]
    ctx = context(part, k, v)
    listed = method.select(ctx, part, k, v).dense_mask()[0]
    assert torch.equal(listed.repeat_interleave(4 // len(listed), 0), pairs[:, -n_q:])
    assert (method.attend(ctx, part, k, v) - masked_dense(q, k, v, pairs)[:, :, -n_q:]).abs().max() < 1e-12


def test_the_two_forms_differ_in_the_wrapped_group_only() -> None:
    q, k, v = qkv(64)
    a, b = (LongLoRA(wrapped=w).attend(context(q, k, v), q, k, v) for w in (True, False))
    differ = (a - b).abs().amax((0, 3)) > 1e-9
    assert not differ[:2].any() and not differ[2:, :56].any() and differ[2:, 56:].all()


@pytest.mark.parametrize(("heads", "kv_heads", "shifted"), [(6, 2, 0.5), (6, 1, 0.5), (6, 2, 0.34), (5, 5, 0.5), (4, 2, 1.0)])
def test_every_layout_of_heads(heads: int, kv_heads: int, shifted: float) -> None:
    q, k, v = qkv(40, heads=heads, kv_heads=kv_heads)
    count = round(shifted * heads)
    pairs = torch.stack([group_map(40, 10, 5 if h >= heads - count else 0, True) for h in range(heads)])
    method = LongLoRA(shifted=shifted)
    assert (method.attend(context(q, k, v), q, k, v) - masked_dense(q, k, v, pairs)).abs().max() < 1e-12


def test_reach_grows_by_half_a_group_a_layer() -> None:
    """What a token of half-block 0 reaches, by gradients through layers of attention; unshifted groups are never left."""
    generator = torch.Generator().manual_seed(0)
    for shifted, expected in ((0.5, [1, 2, 3, 4]), (0.0, [1, 1, 1, 1])):
        method = LongLoRA(group=8, wrapped=False, shifted=shifted)
        x = start = torch.randn(1, 4, 40, 8, generator=generator, dtype=torch.float64).requires_grad_()
        furthest = []
        for _ in range(4):
            x = x + method.attend(context(x, x, x), x, x, x).mean(1, keepdim=True)  # heads are mixed, as an output projection does
            felt = [bool(torch.autograd.grad(x[0, :, i].sum(), start, retain_graph=True)[0][0, :, 0].any()) for i in range(0, 40, 4)]
            furthest.append(max(i for i, f in enumerate(felt) if f))
        assert furthest == expected


def test_nothing_flows_backwards_in_time() -> None:
    """The plain roll lets the first half group see the end of the sequence; true positions do not."""
    for t in (3, 20, 47):
        q, k, v = qkv(48, grad=True)
        out = LongLoRA().attend(context(q, k, v), q, k, v)
        gradients = torch.autograd.grad(out[:, :, : t + 1].pow(2).sum(), (q, k, v))
        assert all(not g[:, :, t + 1 :].any() for g in gradients)


def test_pairs_computed_are_a_quarter_of_dense() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 97, (2, 128), generator=torch.Generator().manual_seed(0))
    with saccade.attach(model, prefill="longlora(shifted=0.0)") as handle, torch.no_grad():
        model(ids)
        assert handle.stats().prefill_density == pytest.approx(4 * 32 * 33 / (128 * 129))
    with saccade.attach(model, prefill="longlora") as handle, torch.no_grad():
        model(ids)
        density = handle.stats().prefill_density
    pairs = sum(float(group_map(128, 32, s, True).sum()) for s in (0, 16)) / 2
    assert density == pytest.approx(pairs / (128 * 129 / 2))


def test_an_attached_model_trains_as_with_the_mask() -> None:
    """model.train(), a loss, backward: gradients of all weights equal those of transformers' eager attention under the same mask."""
    model = tiny("llama", torch.float64)
    ids = torch.randint(3, 97, (2, 64), generator=torch.Generator().manual_seed(0))

    def gradients(**options: object) -> dict[str, Tensor]:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False, **options).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    model.train()
    try:
        with saccade.attach(model, prefill="longlora(shifted=0.0)"):
            ours = gradients()
        pairs = group_map(64, 16, 0, True)
        mask = torch.zeros(2, 1, 64, 64, dtype=torch.float64).masked_fill(~pairs, -torch.inf)
        theirs = gradients(attention_mask=mask)
        dense_ones = gradients()
    finally:
        model.eval()
    assert set(ours) == set(theirs) and len(ours) == len(list(model.parameters()))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-7, atol=1e-10) for name in ours)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.allclose(ours[name], dense_ones[name], rtol=1e-2)


def test_what_a_cache_would_have_to_keep() -> None:
    """Brute force over later queries. Wrapped groups read the first half group again at the end, so it must stay; plain ones let go."""
    n = 48
    for wrapped in (True, False):
        method = LongLoRA(group=16, wrapped=wrapped)
        pattern = method.pattern(n, HEADS)
        pairs = torch.stack([group_map(n, 16, shift, wrapped) for shift in (0, 8)])
        plan = CachePlan(pattern, 2)
        assert plan.evictable == (not wrapped)
        for t in range(n - 1):
            kept = plan.keep(torch.arange(t + 1).expand(1, 2, -1), t)[0]
            assert not (pairs[:, t + 1 :, : t + 1].any(1) & ~kept).any()
        assert plan.size(31).tolist() == [0, 8 + 8 * wrapped]


def test_fields_are_checked() -> None:
    for spec, message in (
        ("longlora(groups=0)", "groups=0"), ("longlora(group=0)", "group=0"), ("longlora(shifted=1.5)", "share of heads"),
    ):
        with pytest.raises(ValueError, match=message):
            build(spec)
