"""MoA (moa, 2406.14909): the loss estimate, the plan search, and spans in prompt and cache."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.contract.models import tiny
from tests.methods.prefill.planted import context
from tests.methods.static.grids import masked_dense, qkv
from torch import Tensor

import saccade
from saccade.cache.segment import Rectangle
from saccade.cache.slots import Slots
from saccade.core import Plan
from saccade.methods import build
from saccade.methods.static.moa import MoA
from saccade.parts.static.assign import assign_rules
from saccade.parts.static.removal import removal_by_tile, removal_effect
from saccade.parts.static.spans import rule_costs, rule_losses, span_rules

TINY = "moa(block=8, alpha_step=16, alpha_max=64, betas=3, bound=0.6)"


def plan_of(alpha: list[float], beta: list[float]) -> Plan:
    tensors = {"layer.0.alpha": torch.tensor(alpha), "layer.0.beta": torch.tensor(beta)}
    return Plan(slug="moa", spec="moa", fingerprint="", tensors=tensors, notes={})


def span_map(spans: list[float], n: int, block: int) -> Tensor:
    """Which row reads which, one map a head: `(H, n, n)`."""
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    distance = i // block - j // block
    return torch.stack([(j <= i) & ((j < block) | (distance < span / block)) for span in spans])


# -- the loss estimate ---------------------------------------------------------------------------------------------------


def test_effect_is_exactly_the_change_of_the_renormalised_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 9, generator=generator, dtype=torch.float64).softmax(-1)
    gradient = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    effect = removal_effect(weights, gradient)
    for j in range(9):
        without = weights.clone()
        without[:, j] = 0
        without = without / without.sum(-1, keepdim=True)
        change = (gradient * (without - weights)).sum(-1)
        assert torch.allclose(effect[:, j], change, rtol=1e-5, atol=1e-9)
    alone = removal_effect(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0]]))
    assert alone.tolist() == [[-2.0, 0.0]]


def test_effect_by_tile_equals_the_whole_map() -> None:
    q, k, v = qkv(37, grad=True)
    weights = (q @ k.repeat_interleave(2, 1).mT * 8**-0.5).masked_fill(~torch.ones(37, 37).tril().bool(), -torch.inf).softmax(-1)
    weights.retain_grad()
    out = weights @ v.repeat_interleave(2, 1)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    out.backward(upstream)
    assert weights.grad is not None
    whole = removal_effect(weights.detach(), weights.grad).tril()
    tiles = torch.nn.functional.pad(whole, (0, 3, 0, 3)).unflatten(2, (5, 8)).unflatten(4, (5, 8)).sum((0, 3, 5))
    got = removal_by_tile(q.detach(), k.detach(), v.detach(), upstream, scale=8**-0.5, softcap=None, block=8)
    assert torch.allclose(got.flatten(0, 1).double(), tiles, rtol=1e-4, atol=1e-4)


# -- the plan search -----------------------------------------------------------------------------------------------------


def brute(losses: list[Tensor], costs: Tensor, bound: float, most_rules: int) -> set[tuple[float, ...]]:
    """Every Pareto point of the losses by enumeration."""
    heads, rules = losses[0].shape[0], costs.shape[0]
    points = []
    for choice in itertools.product(range(rules), repeat=heads * len(losses)):
        by_layer = [choice[i * heads : (i + 1) * heads] for i in range(len(losses))]
        if any(len(set(own)) > most_rules for own in by_layer) or (costs[list(choice)].mean(0) > bound + 1e-9).any():
            continue
        points.append(sum(losses[i][range(heads), own].sum(0) for i, own in enumerate(by_layer)))
    front = [p for p in points if not any((o <= p).all() and (o < p).any() for o in points)]
    return {tuple(round(float(x), 6) for x in p) for p in front}


@pytest.mark.parametrize("most_rules", [1, 2])
def test_search_finds_the_whole_pareto_set(most_rules: int) -> None:
    generator = torch.Generator().manual_seed(3)
    costs = torch.tensor([[0.2, 0.1], [0.4, 0.4], [0.5, 0.8], [1.0, 1.0]], dtype=torch.float64)
    losses = [torch.rand(3, 4, 2, generator=generator, dtype=torch.float64).sort(1, descending=True).values for _ in range(2)]
    found = assign_rules(losses, costs, 0.5, rules_per_layer=most_rules)
    assert found.exact
    assert {tuple(round(float(x), 6) for x in p) for p in found.losses} == brute(losses, costs, 0.5, most_rules)
    assert (found.costs <= 0.5 + 1e-9).all()
    assert all(len(set(layer.tolist())) <= most_rules for plan in found.rules for layer in plan)


def test_a_bound_below_every_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule is cheap enough"):
        assign_rules([torch.zeros(2, 1, 1)], torch.tensor([[0.5]]), 0.4)


def test_costs_count_the_tiles_that_are_read() -> None:
    rules = torch.tensor([[0.0, 1.0], [16.0, 0.0], [-8.0, 0.5]], dtype=torch.float64)
    costs = rule_costs(rules, [64, 96], 8)
    for r, (alpha, beta) in enumerate(rules.tolist()):
        for c, n in enumerate((64, 96)):
            tiles = span_map([alpha + beta * n], n, 8)[0].unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).any(3).any(1)
            assert costs[r, c] == pytest.approx(float(tiles.sum()) / (n // 8 * (n // 8 + 1) / 2))
    assert costs[0].tolist() == [1.0, 1.0]


def planted_sums() -> dict[int, dict[str, Tensor]]:
    """Effects of two heads: the first needs the last 16 tokens, the second the last half of the sequence."""
    sums: dict[int, dict[str, Tensor]] = {0: {}}
    for n in (64, 96, 128):
        tiles = n // 8
        distance = torch.arange(tiles).unsqueeze(1) - torch.arange(tiles)
        near, far = (distance >= 0) & (distance < 2), (distance >= 0) & (distance < tiles // 2)
        sums[0][f"effect.{n}"] = torch.stack([near, far]).float().unsqueeze(1)
        sums[0][f"samples.{n}"] = torch.tensor(1.0)
    return sums


def test_planted_heads_get_a_fixed_and_a_growing_span() -> None:
    method = build("moa(block=8, alpha_step=8, alpha_max=64, betas=5, bound=0.75)")
    assert isinstance(method, MoA)
    sums = planted_sums()
    found = method.conclude_all(sums)[0]
    spans = [(found["alpha"] + found["beta"] * n).tolist() for n in (64, 96, 128)]
    assert [s[0] for s in spans] == [16.0, 16.0, 16.0]
    assert all(span[1] >= n / 2 for span, n in zip(spans, (64, 96, 128), strict=True))
    lengths = [64, 96, 128]
    rules = span_rules(64, 8, 64, 5)
    losses, costs = rule_losses(sums[0], lengths, rules, 8), rule_costs(rules, lengths, 8)
    mine = [int(((rules == torch.stack([a, b])).all(1)).nonzero()) for a, b in zip(found["alpha"], found["beta"], strict=True)]
    planned = losses[range(2), mine].sum(0)
    cost = costs[mine].mean(0)
    uniform = [losses[:, r].sum(0) for r in range(len(rules)) if (costs[r] <= cost + 1e-9).all()]
    assert all((planned <= u).all() and (planned < u).any() for u in uniform)


def test_calibration_touches_no_gradient_and_bounds_density() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 97, (2, 128), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    plan = saccade.calibrate(model, TINY, [ids[:, :64], ids[:, :96], ids], progress=done.append)
    again = saccade.calibrate(model, TINY, [ids[:, :64], ids[:, :96], ids])
    assert done == [1, 2, 3] and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, again.tensors[name]) for name, a in plan.tensors.items())
    with saccade.attach(model, prefill=TINY, plan=plan) as handle, torch.no_grad():
        model(ids)
        density = handle.stats().prefill_density
    assert density is not None and density < 0.65  # the bound is on tiles, of which the diagonal ones count whole


# -- reading -------------------------------------------------------------------------------------------------------------


def test_the_identity_rule_equals_dense() -> None:
    q, k, v = qkv(100)
    dense = masked_dense(q, k, v, torch.ones(100, 100, dtype=torch.bool).tril())
    got = MoA(block=8).attend(context(q, k, v, plan=plan_of([0, 0], [1, 1])), q, k, v)
    assert (got - dense).abs().max() < 1e-12


def test_each_head_reads_its_own_span() -> None:
    q, k, v = qkv(100)
    exact = masked_dense(q, k, v, span_map([20, 20, 50, 50], 100, 8))
    method, plan = MoA(block=8), plan_of([20, 0], [0, 0.5])
    ctx = context(q, k, v, plan=plan)
    assert (method.attend(ctx, q, k, v) - exact).abs().max() < 1e-12
    part = q[:, :, -33:]
    assert (method.attend(context(part, k, v, plan=plan), part, k, v) - exact[:, :, -33:]).abs().max() < 1e-12


def test_ring_decoding_equals_the_masked_forward() -> None:
    """Step by step over what the cache holds, with spans for the length that the request may reach."""
    n, prompt, spans = 96, 41, [20.0, 48.0]
    q, k, v = qkv(n, batch=1)
    exact = masked_dense(q, k, v, span_map([20, 20, 48, 48], n, 8))
    method, plan = MoA(block=8, max_length=n), plan_of([20, 0], [0, 0.5])
    state: dict = {}
    entries = Rectangle(k[:, :, :0], v[:, :, :0], {"positions": torch.empty(1, 2, 0, dtype=torch.int32)})
    slots = Slots(entries)
    held = []
    for t in range(n):
        slots = appended(slots, k[:, :, t : t + 1], v[:, :, t : t + 1])
        ctx = context(q[:, :, t : t + 1], slots.keys, slots.values, plan=plan)
        ctx.seen, ctx.state = t + 1, state
        if t >= prompt:
            real = torch.ones_like(slots.side["positions"], dtype=torch.bool) if slots.valid is None else slots.valid
            out = masked_dense(q[:, :, t : t + 1], slots.keys, slots.values, real.repeat_interleave(2, 1).unsqueeze(2))
            assert (out - exact[:, :, t : t + 1]).abs().max() < 1e-12, t
        method.watch(ctx, slots, q[:, :, t : t + 1])
        if t == prompt - 1 or (t >= prompt and method.due(ctx, slots.length)):
            method.compress(ctx, slots)
            counts = slots.length if slots.valid is None else slots.valid.sum(-1)[0].tolist()
            held.append(counts)
    assert held[-1] == [8 + 16, 8 + 40] and spans[0] < spans[1]


def appended(slots: Slots, k: Tensor, v: Tensor) -> Slots:
    """The entries and one more in every head, the gaps at the end of a head's own."""
    side = {name: torch.cat([x, x.new_zeros(1, 2, 1)], -1) for name, x in slots.side.items()}
    keys, values = torch.cat([slots.keys, k], 2), torch.cat([slots.values, v], 2)
    if slots.valid is None:
        return Slots(Rectangle(keys, values, side))
    valid = torch.cat([slots.valid, torch.ones_like(slots.valid[..., :1])], -1)
    order = torch.sort((~valid).to(torch.uint8), dim=-1, stable=True).indices
    wide = order.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    side = {name: x.gather(2, order) for name, x in side.items()}
    return Slots(Rectangle(keys.gather(2, wide), values.gather(2, wide), side, valid.gather(2, order)))


def test_on_a_model_the_cache_shrinks_and_generation_goes_on() -> None:
    model = tiny("llama", torch.float64)
    ids = torch.randint(3, 97, (2, 160), generator=torch.Generator().manual_seed(0))
    plan = saccade.calibrate(model, TINY, [ids[:, :64], ids[:, :96]])
    with saccade.attach(model) as handle:
        model.generate(ids, max_new_tokens=12, do_sample=False)
        full = handle.stats().kv_bytes
    with saccade.attach(model, prefill=TINY, cache=TINY, plan=plan) as handle:
        one = model.generate(ids[:1], max_new_tokens=12, do_sample=False)
        both = model.generate(ids, max_new_tokens=12, do_sample=False)
        stats = handle.stats()
        padded = torch.cat([torch.zeros(1, 11, dtype=torch.long), ids[:1, :149]], 1)
        mask = torch.ones(2, 160, dtype=torch.long)
        mask[1, :11] = 0
        mixed = model.generate(torch.cat([ids[:1], padded]), attention_mask=mask, max_new_tokens=12, do_sample=False)
        alone = model.generate(ids[:1, :149], max_new_tokens=12, do_sample=False)
        beams = model.generate(ids, max_new_tokens=4, do_sample=False, num_beams=3)
        repeats = ids[:1, :20].repeat(1, 4)
        guessed = model.generate(repeats, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=5)
        assert model.generate(ids[:, :9], max_new_tokens=2, do_sample=False).shape == (2, 11)
    assert stats.kv_bytes < 0.85 * full
    assert torch.equal(one[0], both[0]) and torch.equal(mixed[0], one[0]) and torch.equal(mixed[1, 160:], alone[0, 149:])
    assert beams.shape == (2, 164) and guessed.shape == (1, 92)


def test_fields_are_checked_and_a_plan_is_asked_for() -> None:
    for spec, message in (("moa(bound=0)", "bound=0"), ("moa(block=0)", "block=0"), ("moa(answer=1.5)", "answer=1.5")):
        with pytest.raises(ValueError, match=message):
            build(spec)
    with pytest.raises(ValueError, match="needs a calibration plan"):
        saccade.attach(tiny("llama"), cache="moa")
