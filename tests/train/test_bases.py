"""Bases for matryoshkakv: training lowers what few coordinates lose, and the search by predictions spends ranks where they count."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.contract.harness import tokens
from tests.contract.models import tiny
from torch import Tensor

import saccade
from saccade.core import Plan
from saccade.parts.rank_search import LEVELS, even_shares, levels_at
from saccade.train.bases import Coordinates, divergence_at, projecting_session, search_ranks, train_bases


@cache
def spoken(seed: int) -> Tensor:
    """A batch `(4, 48)` of what the model itself says, so that it is right about its tokens."""
    torch.manual_seed(seed)
    return tiny("llama").generate(tokens(4, 4, seed=seed), max_new_tokens=44, min_new_tokens=44, do_sample=True)


@cache
def start() -> Plan:
    return saccade.calibrate(tiny("llama"), "matryoshkakv", [spoken(0)])


@pytest.mark.slow
def test_training_lowers_what_a_quarter_of_the_coordinates_loses() -> None:
    model, log = tiny("llama"), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = train_bases(
        model, (spoken(i % 3) for i in range(120)), start(), steps=120, rate=1e-2, warmup=20, seed=1, progress=log.append
    )
    held = spoken(9)
    plans = {"old": start(), "new": trained}
    errors = {name: [divergence_at(model, held, plan, level) for level in (2, 4, LEVELS)] for name, plan in plans.items()}
    assert errors["new"][0] < 0.95 * errors["old"][0] and errors["new"][1] < 1.02 * errors["old"][1]
    assert errors["new"][2] < 1e-4  # all coordinates are everything, in any basis
    assert [row["step"] for row in log] == list(range(120)) and trained.notes["trained_steps"] == 120
    for layer in range(2):
        for name in ("key", "value"):
            basis = trained.tensor(layer, f"{name}_basis")
            assert float((basis.mT @ basis - torch.eye(16)).abs().max()) < 1e-5
            assert not torch.equal(basis, start().tensor(layer, f"{name}_basis"))
            assert torch.equal(trained.tensor(layer, f"{name}_shares"), start().tensor(layer, f"{name}_shares"))
    assert all(torch.equal(p, before[name]) and p.requires_grad and p.grad is None for name, p in model.named_parameters())
    with saccade.attach(model, cache="matryoshkakv(recent=4)", plan=trained):
        assert model.generate(tokens(1, 60), max_new_tokens=4, do_sample=False).shape == (1, 64)


def test_the_same_seed_gives_the_same_bases() -> None:
    plans = [train_bases(tiny("llama"), [spoken(0)] * 3, start(), steps=3, seed=seed) for seed in (0, 0, 1)]
    name = "layer.0.key_basis"
    assert torch.equal(plans[0].tensors[name], plans[1].tensors[name]) and not torch.equal(plans[0].tensors[name], plans[2].tensors[name])


def test_projecting_is_what_a_cache_of_these_ranks_gives() -> None:
    """Logits of a step after a prompt that was attended through its coordinates, against keys and values restored by the segment."""
    model = tiny("llama", torch.float64)
    plan, x = start(), torch.randn(2, 2, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    coordinates = Coordinates.of(model, plan)
    coordinates.levels[1, "key"] = torch.tensor([3, 7])
    got = coordinates.through(1, "key", x)
    basis, mean = plan.tensor(1, "key_basis").double(), plan.tensor(1, "key_mean").double()
    for head, rank in ((0, 6), (1, 14)):
        kept = basis[head, :, :rank]
        assert float((got[:, head] - ((x[:, head] - mean[head]) @ kept @ kept.mT + mean[head])).abs().max()) < 1e-5
    ids = tokens(2, 40)
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        with projecting_session(model, Coordinates.of(model, plan)):
            assert float((model(ids, use_cache=False).logits - dense).abs().max()) < 1e-4


def test_search_by_predictions_beats_even_ranks() -> None:
    model, log = tiny("llama"), []
    found = search_ranks(model, [spoken(1)], start(), at_once=0.5, progress=log.append)
    kept = [row["kept"] for row in log]
    assert kept == sorted(kept, reverse=True) and kept[-1] == pytest.approx(1 / LEVELS)
    errors = []
    for even in (True, False):
        coordinates = Coordinates.of(model, found)
        for layer in range(2):
            own = torch.stack([found.tensor(layer, f"{name}_shares") for name in ("key", "value")])
            levels = levels_at(even_shares(2) if even else own, 0.5)
            coordinates.levels[layer, "key"], coordinates.levels[layer, "value"] = levels
        assert int(torch.stack(list(coordinates.levels.values())).sum()) == 32
        with torch.no_grad():
            dense = model(spoken(9), use_cache=False).logits.log_softmax(-1)
            with projecting_session(model, coordinates):
                got = model(spoken(9), use_cache=False).logits.log_softmax(-1)
        errors.append(float((dense.exp() * (dense - got)).sum(-1).mean()))
    assert errors[1] < errors[0]


def test_wrong_inputs_are_refused() -> None:
    model = tiny("llama")
    for changes, match in (({"steps": 0}, "steps=0"), ({"steps": 3}, "ended after 1 of 3"), ({"steps": 1, "share": 2.0}, "share=2.0")):
        with pytest.raises(ValueError, match=match):
            train_bases(model, [spoken(0)], start(), **changes)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="at least one"):
        search_ranks(model, [], start())
    with pytest.raises(ValueError, match="made for another model"):
        train_bases(tiny("llama-mqa"), [spoken(0)], start(), steps=1)


@pytest.mark.slow
def test_on_the_pocket_model_trained_bases_find_what_untrained_ones_lose() -> None:
    from random import Random

    from tests.methods.kvcomp.stage import answered, ids_of, needle

    from saccade.evaluate.text import grammar

    model, _ = saccade.pocket(dtype=torch.float32)

    def text(seed: int) -> Tensor:
        return needle(384, seed * 0.37 % 1, seed=seed)[0] if seed % 2 else ids_of(grammar().haystack(Random(seed), 383))

    plan = saccade.calibrate(model, "matryoshkakv", [text(100), text(101)])
    trained = train_bases(model, (text(1000 + i) for i in range(150)), plan, steps=150, warmup=20)
    prompts = [needle(1024, depth, seed) for seed, depth in ((1, 0.4), (2, 0.7), (3, 0.1), (4, 0.9))]
    spec = "matryoshkakv(budget=0.375, even=True)"
    found = [[answered(*prompt, cache=spec, plan=own) for prompt in prompts] for own in (plan, trained)]
    assert sum(ok for ok, _ in found[1]) == 4 > sum(ok for ok, _ in found[0])
    assert found[1][0][1] < 0.46  # of the bytes
