"""delta-layer-aware: what planners pick, where a calibration puts them, and pages under shuffled physical ids."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest
import torch
from tests.methods.decode.harness import answer, best, ids_of, logits, needle, pocket
from tests.methods.decode.stack import Layer, dense, listed, over, random_stack, run_stack, stack_context, worst
from torch import Tensor

import saccade
from saccade.core import Mass, Plan, Selection
from saccade.core.method import LayerPolicy
from saccade.evaluate.text import grammar
from saccade.methods import build
from saccade.methods.decode.delta_layer_aware import DeltaLayerAware
from saccade.ops import decode
from saccade.parts.page_mass import best_pages, page_sums

SMALL = {"page_size": 8, "budget": 40, "recent_pages": 2, "dense": (0, 1, 4)}  # 5 of 12 pages


def page_mask(selection: Selection, size: int) -> Tensor:
    """`(B, H, pages)` bool."""
    chosen = torch.zeros(*selection.starts.shape[:2], -(-selection.n_k // size), dtype=torch.bool)
    return chosen.scatter(-1, selection.starts.squeeze(2).long() // size, True)


def published(method: DeltaLayerAware, layer: Layer) -> Selection:
    found = run_stack(method, [layer, layer])[0].published
    assert found is not None
    return found


def with_logits(scores: Tensor) -> Layer:
    """A layer whose attention logits are `scores (B, H, n)`: query h reads channel h of the keys."""
    heads = scores.shape[1]
    k = scores.mT.unsqueeze(1).contiguous()
    return torch.eye(heads, dtype=scores.dtype).expand(scores.shape[0], -1, -1).unsqueeze(2) * heads**0.5, k, k


# -- what is picked -----------------------------------------------------------------------------------------------------


def test_followers_read_the_planner_s_pages() -> None:
    layers = random_stack(7)
    steps = run_stack(DeltaLayerAware(**SMALL), layers)
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        if number in (0, 1, 4):
            assert worst(step.out, dense(layer)) < 1e-13 and step.pairs == 90
            assert (step.published is None) == (number == 0), "a dense layer before another dense layer has nothing to say"
            continue
        source = 1 if number < 4 else 4
        q, k, _ = layers[source]
        p = (logits(q, k) * 16**-0.5).softmax(-1).amax(1)  # over heads first
        sums = torch.stack([page.sum(-1) for page in p.split(8, dim=-1)], -1)
        sums[:, -2:] = torch.inf
        mask = best(sums, 5).repeat_interleave(8, -1)[:, None, :90].expand(-1, 6, -1)
        assert worst(step.out, over(layer, mask)) < 1e-13 and step.pairs == 40
        found = steps[source].published
        assert found is not None and torch.equal(listed(found, 6), mask)


def test_a_page_that_one_head_needs_is_kept_where_the_mean_over_heads_loses_it() -> None:
    scores = torch.full((1, 8, 256), -4.0, dtype=torch.float64)
    scores[0, 0, 5 * 16 + 3] = 8.0  # one head, one token
    scores[0, 1:, [8 * 16, 9 * 16, 10 * 16, 11 * 16]] = 4.0  # the others agree on four pages
    layer = with_logits(scores)
    method = DeltaLayerAware(budget=80, recent_pages=1, dense=(0,))
    assert page_mask(published(method, layer), 16)[0, 0].nonzero()[:, 0].tolist() == [5, 8, 9, 10, 15]
    mean = page_sums(scores.softmax(-1).mean(1), 16)
    assert best_pages(mean, 5, 1)[0].tolist() == [8, 9, 10, 11, 15]


def test_tokens_of_different_heads_add_up_within_a_page() -> None:
    """The maximum over heads is taken token by token, before the sum over the page."""
    scores = torch.zeros(1, 4, 64, dtype=torch.float64)
    for head in range(4):
        scores[0, head, 16 + head] = 3.0  # four heads, four tokens of page 1
        scores[0, head, 32] = 4.0  # and one token of page 2 that all look at more
    chosen = page_mask(published(DeltaLayerAware(budget=32, recent_pages=1, dense=(0,)), with_logits(scores)), 16)
    assert chosen[0, 0].tolist() == [False, True, False, True]


@pytest.mark.parametrize("n", [81, 88, 90, 200])
@pytest.mark.parametrize("budget", [40, 0.3, 8])
def test_the_last_pages_are_always_read_in_logical_order(n: int, budget: float | int) -> None:
    layers = random_stack(2, n=n)
    method = DeltaLayerAware(page_size=8, budget=budget, recent_pages=2, dense=(0,))
    chosen = published(method, layers[0])
    starts = chosen.starts[:, 0, 0]
    count = method.pages(n)
    assert starts.shape[-1] == count and bool((starts[:, 1:] > starts[:, :-1]).all())
    assert starts[:, -min(2, count) :].tolist() == [[(-(-n // 8) - i) * 8 for i in range(min(2, count), 0, -1)]] * 2


def test_shuffled_physical_pages_give_the_same() -> None:
    """Logical pages, mapped through a block table of shuffled physical ids, are the same keys."""
    q, k, v = random_stack(1, batch=1, n=96)[0]
    chosen = published(DeltaLayerAware(page_size=8, budget=40, recent_pages=2, dense=(0,)), (q, k, v))
    physical = torch.randperm(12, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    pool_k, pool_v = (torch.empty(12, 8, 2, 16, dtype=torch.float64) for _ in range(2))
    for pool, x in ((pool_k, k), (pool_v, v)):
        pool[physical.long()] = x[0].transpose(0, 1).unflatten(0, (12, 8))
    paged = decode(q, pool_k, pool_v, chosen, block_table=physical[None])
    assert worst(paged.out, decode(q, k, v, chosen).out) < 1e-14


@pytest.mark.parametrize("budget", [1.0, 90, 96, 1000])
def test_as_many_pages_as_there_are_equal_dense_bit_for_bit(budget: float | int) -> None:
    layers = random_stack(4)
    plain = run_stack(DeltaLayerAware(dense=(0, 1, 2, 3)), layers)
    for step, want in zip(run_stack(DeltaLayerAware(page_size=8, budget=budget, dense=(0,)), layers), plain, strict=True):
        assert torch.equal(step.out, want.out) and step.pairs == 90


def test_followers_are_dense_until_the_cache_has_outgrown_the_ratio() -> None:
    fields = {**SMALL, "dense": (0,)}
    for ratio, n, pairs in ((1, 40, 40), (1, 41, 33), (2, 80, 80), (2, 81, 33)):
        steps = run_stack(DeltaLayerAware(**fields, ratio=ratio), random_stack(2, n=n))
        assert steps[1].pairs == (40 if pairs == 33 else pairs)


# -- who plans ----------------------------------------------------------------------------------------------------------


def roles(method: DeltaLayerAware, depth: int, plan: Plan | None = None) -> list[LayerPolicy]:
    layer = random_stack(1)[0]
    return [method.role(stack_context(number, depth, *layer, {}, [], plan=plan)) for number in range(depth)]


def test_defaults_are_the_paper_s_layers_of_28() -> None:
    got = roles(DeltaLayerAware(), 28)
    assert got == ["dense", "dense", "select", *[2] * 11, "select", *[14] * 7, "select", *[22] * 5]
    assert roles(DeltaLayerAware(dense=(1, 3)), 6) == ["dense", "select", 1, "select", 3, 3]


@cache
def calibrated(spec: str = "delta-layer-aware") -> Plan:
    text = grammar()
    return saccade.calibrate(pocket(), spec, [ids_of(text.haystack(Random(seed), 1023)) for seed in range(2)])


@pytest.mark.slow
def test_a_calibration_plans_where_the_attention_map_turns() -> None:
    plan = calibrated()
    change = [float(plan.tensor(layer, "change")) for layer in range(8)]
    # layer 5 is where this model begins to retrieve
    assert max(change) == change[5] > 2 * sorted(change)[-2] and abs(change[0]) < 1e-12
    assert roles(DeltaLayerAware(), 8, plan) == ["dense", "dense", "select", 2, 2, "select", 5, 5]
    assert roles(DeltaLayerAware(dense=(0,)), 8, plan)[5] == 0, "layers that are named win over the plan"


def test_change_is_measured_against_the_layer_before() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(3, h, 80, 16, generator=g, dtype=torch.float64) for h in (6, 2, 2)] for _ in range(2))
    shared: dict[str, object] = {}
    change = []
    for number, (q, k, v) in enumerate([a, a, b, b]):
        found = DeltaLayerAware(page_size=8).measure(stack_context(number, 4, q, k, v, shared, []), q, k, v)
        change.append(float(found["change"] / found["samples"]))
    assert change[:2] == [0, 0] == [change[0], round(change[3], 12)] and change[2] > 1e-3
    maps = []
    for q, k, _ in (a, b):
        weights = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(3, 1)) / 4
        p = weights.masked_fill(torch.ones(80, 80).triu(1).bool(), -torch.inf).softmax(-1)
        maps.append(p.mean(1).unflatten(1, (10, 8)).unflatten(3, (10, 8)).sum((2, 4)).flatten(1))
    assert change[2] == pytest.approx(float((1 - torch.cosine_similarity(*maps)).mean()))


def test_planners_are_spread_over_the_depth() -> None:
    method = DeltaLayerAware(planners=4, first=1)
    change = torch.tensor([0.0, 0.1, 0.9, 0.2, 0.1, 0.8, 0.7, 0.1, 0.1, 0.6, 0.1, 0.5])
    sums = {2 * i: {"change": 3 * c, "samples": torch.tensor(3.0)} for i, c in enumerate(change)}  # every other layer measured
    found = method.conclude_all(sums)
    # 0.9 stands next to the first planner, 0.7 next to 0.8, 0.5 within reach of 0.6
    got = [int(found[layer]["role"]) for layer in sorted(found)]
    assert got == [-1, -2, 2, 2, 2, -2, 10, 10, 10, -2, 18, 18]
    assert float(found[4]["change"]) == pytest.approx(0.9)


# -- the pocket model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["named", pytest.param("calibrated", marks=pytest.mark.slow)])
def test_the_pocket_model_finds_a_needle(how: str) -> None:
    prompt = needle()
    method = DeltaLayerAware(budget=0.25, dense=(0, 4) if how == "named" else None, first=1)
    text, stats = answer(prompt, method, None if how == "named" else calibrated("delta-layer-aware(first=1)"))
    assert text == prompt.answer
    full = (0, 4) if how == "named" else (0, 1, 5)
    for layer in stats.per_layer:
        assert layer["decode_density"] == 1 if layer["layer"] in full else 0.22 < layer["decode_density"] <= 0.25


def test_random_pages_of_the_same_number_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    import saccade.methods.decode.delta_layer_aware as module

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "page_sums", lambda x, size: torch.rand(1, 1, -(-x.shape[-1] // size), generator=g))
    prompt = needle()
    assert answer(prompt, DeltaLayerAware(budget=0.25, dense=(0, 4)))[0] != prompt.answer


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 0}, "page_size=0: expected a whole number of at least 1"),
        ({"recent_pages": 0}, "recent_pages=0"),
        ({"ratio": 0.5}, "ratio=0.5: expected a number of at least 1"),
        ({"dense": ()}, r"dense=\(\): expected a tuple of layers"),
        ({"dense": (0, 1.5)}, "dense=1.5: expected a layer's number"),
        ({"dense": [0]}, "expected a tuple"),
        ({"budget": Mass(0.9)}, "reads a fixed number of pages"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaLayerAware(**fields)


def test_spec_round_trip() -> None:
    spec = "delta-layer-aware(page_size=32, budget=0.1, recent_pages=4, dense=(0, 0.5))"
    assert build(spec).spec == spec
