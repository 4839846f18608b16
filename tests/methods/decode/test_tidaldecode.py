"""tidaldecode: who searches, what is read again, and what the correction layer is for."""

from __future__ import annotations

import pytest
import torch
from tests.methods.decode.harness import answer, best, logits, needle, pocket
from tests.methods.decode.stack import (
    dense,
    listed,
    over,
    planted_stack,
    pocket_stack,
    random_stack,
    run_stack,
    stack_context,
    top_recall,
    worst,
)
from transformers import DynamicCache

import saccade
from saccade.core import Mass
from saccade.core.method import LayerPolicy
from saccade.methods import build
from saccade.methods.decode.tidaldecode import TidalDecode
from saccade.ops.estimate import Reduce
from saccade.parts.heads import reduce_heads
from saccade.parts.planner import step_logits

# -- what is read -------------------------------------------------------------------------------------------------------


def test_layers_read_what_the_searching_layer_found_head_by_head() -> None:
    layers = random_stack(6)
    method = TidalDecode(budget=20, start=1, correction=3)
    steps = run_stack(method, layers)
    for number, (layer, step) in enumerate(zip(layers, steps, strict=True)):
        if number in (0, 1, 3):
            assert worst(step.out, dense(layer)) < 1e-13 and step.pairs == 90
            continue
        q, k, _ = layers[1 if number < 3 else 3]
        scores = logits(q, k)
        scores[..., -1] = torch.inf  # the newest token
        assert worst(step.out, over(layer, best(scores, 20))) < 1e-13 and step.pairs == 20
        assert step.published is None


@pytest.mark.parametrize("reduce", ["none", "group_max", "group_sum"])
def test_lists_are_of_a_query_head_or_of_its_group(reduce: Reduce) -> None:
    layers = random_stack(3)
    chosen = run_stack(TidalDecode(budget=12, start=1, correction=None, reduce=reduce), layers)[1].published
    assert chosen is not None and chosen.tokens.shape == (2, 6 if reduce == "none" else 2, 1, 12)
    scores = logits(layers[1][0], layers[1][1]) * 16**-0.5
    if reduce != "none":
        grouped = scores.unflatten(1, (2, 3))
        scores = grouped.amax(2) if reduce == "group_max" else grouped.sum(2)
    scores[..., -1] = torch.inf
    assert torch.equal(listed(chosen, chosen.heads), best(scores, 12))


@pytest.mark.parametrize("reduce", ["none", "group_max", "group_sum"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_of_a_group_choose_what_the_logits_of_its_heads_choose(reduce: Reduce, softcap: float | None) -> None:
    """Where the output needs no logits, one row of scores a group is all there is."""
    layer = random_stack(1)[0]
    method = TidalDecode(budget=12, start=0, correction=None, reduce=reduce)
    ctx = stack_context(0, 3, *layer, {}, [], softcap=softcap)
    scores, plain = method.scores(ctx, layer[0], layer[1]), step_logits(ctx, layer[0], layer[1])
    assert scores.shape == (2, 6 if reduce == "none" else 2, 90)
    assert torch.equal(scores, reduce_heads(plain, 2, reduce)) or worst(scores, reduce_heads(plain, 2, reduce)) < 1e-14
    attended = run_stack(method, [layer] * 3, softcap=softcap)[0].published
    assert attended is not None and torch.equal(method.select(ctx, *layer).tokens, attended.tokens)


@pytest.mark.parametrize("budget", [1.0, 90, 1000])
def test_a_budget_for_all_equals_dense_bit_for_bit(budget: float | int) -> None:
    layers = random_stack(5)
    dense_steps = run_stack(TidalDecode(start=100), layers)
    for step, plain in zip(run_stack(TidalDecode(budget=budget, start=1, correction=3), layers), dense_steps, strict=True):
        assert torch.equal(step.out, plain.out) and step.pairs == 90


def test_the_newest_token_is_read_however_little_it_is_looked_at() -> None:
    layers = random_stack(2)
    q, k, v = layers[0]
    k[:, :, -1] = -4 * q.squeeze(2).unflatten(1, (2, 3)).mean(2)
    chosen = run_stack(TidalDecode(budget=5, start=0, correction=None), [(q, k, v), layers[1]])[0].published
    assert chosen is not None and bool((chosen.tokens[..., -1] == 89).all())


def test_softcap_and_half_precision_in_a_searching_layer() -> None:
    """Its own product gives what dense attention gives, in every dtype and with a cap."""
    layers = random_stack(2)
    for dtype, allowed in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)):
        cast = [tuple(x.to(dtype) for x in layer) for layer in layers]
        for softcap in (None, 1.5):
            plain = run_stack(TidalDecode(start=9), cast, softcap=softcap)[0].out
            own = run_stack(TidalDecode(budget=9, start=0), cast, softcap=softcap)[0].out
            assert own.dtype == dtype and worst(own.double(), plain.double()) < allowed


# -- the cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [5, 9, 16])
def test_layers_that_touch_all_keys_do_not_grow_with_depth(depth: int) -> None:
    method = TidalDecode(budget=8, start=2, correction=4)
    steps = run_stack(method, random_stack(depth, batch=1))
    assert [n for n, step in enumerate(steps) if step.pairs == 90] == [0, 1, 2, 4]  # start + 2 of them
    assert all(step.pairs == 8 for n, step in enumerate(steps) if n not in (0, 1, 2, 4))


def test_defaults_place_the_correction_where_the_paper_does() -> None:
    def roles(method: TidalDecode, depth: int) -> list[LayerPolicy]:
        layer = random_stack(1)[0]
        return [method.role(stack_context(number, depth, *layer, {}, [])) for number in range(depth)]

    assert roles(TidalDecode(), 32) == ["dense", "dense", "select", *[2] * 10, "select", *[13] * 18]
    assert roles(TidalDecode(correction=None), 5) == ["dense", "dense", "select", 2, 2]
    # a correction that is no later than the start is none, and one after the last layer never comes
    assert roles(TidalDecode(correction=1), 8)[4] == roles(TidalDecode(correction=30), 8)[4] == 2


def test_a_layer_whose_planner_does_not_exist_plans_itself() -> None:
    """As in models with sliding windows in every other layer, which an attached method leaves alone."""
    layers = random_stack(8)
    shared: dict[str, object] = {}
    for number in (1, 3, 5, 7):
        pairs: list[float] = []
        ctx = stack_context(number, 8, *layers[number], shared, pairs)
        TidalDecode(budget=9, start=2, correction=6).attend(ctx, *layers[number])
        assert sum(pairs) == (90 if number in (1, 3) else 9)


# -- when it works ------------------------------------------------------------------------------------------------------


def error(places: list[list[int]], method: TidalDecode) -> float:
    layers = planted_stack(places)
    return max(worst(step.out, dense(layer)) for layer, step in zip(layers, run_stack(method, layers), strict=True))


def test_layers_that_share_their_positions_lose_nothing() -> None:
    shared = [[17, 60, 140]] * 10
    assert error(shared, TidalDecode(budget=4, correction=None)) < 2e-3
    apart = [*shared[:6], *[[30, 99, 170]] * 4]
    assert error(apart, TidalDecode(budget=4, correction=None)) > 0.3
    assert error(apart, TidalDecode(budget=4, correction=6)) < 2e-3, "a search where the positions change repairs it"


def test_where_the_correction_stands_changes_what_later_layers_get() -> None:
    """Recall of the top 32 of the pocket model's layers 6 and 7 at 128 of 2048 tokens: the head numbers of layer 5 mean something else."""
    layers = pocket_stack()

    def later(correction: int) -> float:
        steps = run_stack(TidalDecode(budget=128, correction=correction), layers)
        return sum(top_recall(steps, layers, layer, correction, 32) for layer in (6, 7)) / 2

    assert later(4) > 0.5 > 0.2 > later(5)


# -- the pocket model ---------------------------------------------------------------------------------------------------


def test_the_pocket_model_finds_a_needle() -> None:
    prompt = needle()
    text, stats = answer(prompt, TidalDecode(budget=0.25, start=0, correction=4))
    assert text == prompt.answer
    for layer in stats.per_layer:
        assert layer["decode_density"] == 1 if layer["layer"] in (0, 4) else 0.24 < layer["decode_density"] < 0.26
    assert stats.index_bytes == answer(prompt, TidalDecode(start=100))[1].index_bytes, "nothing is kept beside the cache"


def test_random_tokens_of_the_same_number_lose_the_needle(monkeypatch: pytest.MonkeyPatch) -> None:
    import saccade.methods.decode.tidaldecode as module

    g = torch.Generator().manual_seed(0)
    monkeypatch.setattr(module, "reduce_heads", lambda scores, *_: torch.rand(scores.shape, generator=g))
    prompt = needle()
    assert answer(prompt, TidalDecode(budget=0.25, start=0, correction=4))[0] != prompt.answer


@torch.no_grad()
def test_cache_correction_from_outside() -> None:
    """Tokens taken back and fed again as a chunk get the keys of dense attention, from which steps had drifted."""
    model, ids = pocket(), needle().ids[:, :400]
    plain, corrected = (DynamicCache(config=model.config) for _ in range(2))
    model(ids, past_key_values=plain)

    def drift() -> float:
        keys = corrected.layers[7].keys[:, :, 380:400]
        return float((keys - plain.layers[7].keys[:, :, 380:]).norm() / plain.layers[7].keys[:, :, 380:].norm())

    with saccade.attach(model, decode=TidalDecode(budget=8, start=0)):
        model(ids[:, :380], past_key_values=corrected)
        for i in range(380, 400):
            model(ids[:, i : i + 1], past_key_values=corrected)
        before = drift()
        corrected.crop(-20)
        model(ids[:, 380:], past_key_values=corrected)
        after = drift()
    assert before > 0.05 and after < 1e-4, (before, after)


# -- fields -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"start": -1}, "start=-1: expected a layer's number from 0 on"),
        ({"start": True}, "start=True"),
        ({"correction": 1.0}, r"correction=1.0: expected a layer's number from 0 on, or a share of the depth in \[0, 1\)"),
        ({"correction": -2}, "correction=-2"),
        ({"reduce": "vote"}, "expected one of none, group_max, group_sum"),
        ({"budget": 0}, "budget 0 is not a positive number"),
        ({"budget": Mass(0.9)}, "tidaldecode reads a fixed number of tokens"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TidalDecode(**fields)


def test_spec_round_trip() -> None:
    spec = "tidaldecode(budget=0.1, start=1, correction=5, reduce='group_max')"
    assert build(spec).spec == spec
