"""Plans of trained parts from text alone."""

from __future__ import annotations

import pytest
import torch
from tests.contract.harness import greedy, tokens
from tests.contract.models import tiny

import saccade
from saccade.core import Plan
from saccade.evaluate.text import grammar
from saccade.methods import build
from saccade.train.recipes import RECIPES, train_plan


def encode(text: bytes) -> list[int]:
    return [3 + byte % 90 for byte in text]


def trained(spec: str, seed: int = 0) -> tuple[Plan, list[int]]:
    steps: list[int] = []
    plan = train_plan(tiny("llama"), build(spec), grammar(), encode, prefix=[1], length=500, steps=3, seed=seed, progress=steps.append)
    return plan, steps


@pytest.mark.parametrize("spec", ["duoattention(sinks=4, recent=16, block=4)", "attention-gate"])
def test_a_plan_from_text_serves_its_method(spec: str) -> None:
    plan, steps = trained(spec)
    assert steps == [1, 2, 3] and plan.slug == build(spec).info.slug in RECIPES
    again, other = trained(spec)[0], trained(spec, seed=1)[0]
    assert all(torch.equal(again.tensors[name], x) for name, x in plan.tensors.items())
    assert any(not torch.equal(other.tensors[name], x) for name, x in plan.tensors.items())
    with saccade.attach(tiny("llama"), cache=spec, plan=plan):
        assert greedy(tiny("llama"), tokens(1, 60), 4).shape == (1, 64)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="snapkv has no trained parts"):
        trained("snapkv")
    with pytest.raises(ValueError, match="holds no fact and its question: give at least 321"):
        train_plan(tiny("llama"), build("duoattention"), grammar(), encode, length=200)
