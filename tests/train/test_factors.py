"""Factors for cskv: ASVD from the model's projections, and what the reconstruction loss makes of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from tests.contract.harness import tokens
from tests.contract.models import tiny

import saccade
from saccade.attach import capture
from saccade.attach.rotary import rotary_of
from saccade.core import Plan
from saccade.methods.kvcomp.cskv import unturned
from saccade.ops.decode import Packed
from saccade.parts.factors import asvd_factors, beside
from saccade.train.factors import asvd_plan, straight_through, train_factors

BATCHES = [tokens(2, 64, seed=i) for i in range(3)]


@cache
def start(spec: str = "cskv") -> Plan:
    return asvd_plan(tiny("llama"), BATCHES, spec)


def losses(plan: Plan) -> float:
    """The loss on the first batch before any step counts."""
    log: list[dict[str, float]] = []
    train_factors(tiny("llama"), BATCHES, plan, steps=1, rate=0.0, progress=log.append)
    return log[0]["loss"]


def test_asvd_reads_the_projections_inputs_and_weights() -> None:
    model, seen = tiny("llama"), []
    module = model.model.layers[1].self_attn
    hook = module.v_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().flatten(0, 1)))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids)
    hook.remove()
    wanted = asvd_factors(module.v_proj.weight.mT.detach(), torch.cat(seen).mean(0), 16)
    own = [start().tensor(1, f"value_{part}") for part in ("down", "up")]
    assert torch.allclose(own[0] @ own[1], wanted.down @ wanted.up, atol=1e-4) and not module.v_proj._forward_pre_hooks
    plain = asvd_plan(model, BATCHES, alpha=0.0)
    assert not torch.allclose(own[0] @ own[1], plain.tensor(1, "value_down") @ plain.tensor(1, "value_up"), atol=1e-3)


def test_training_lowers_the_loss_towards_the_factors_that_calibration_gives() -> None:
    model, log = tiny("llama"), []
    trained = train_factors(model, (BATCHES[i % 3] for i in range(100)), start(), steps=100, rate=5e-3, progress=log.append)
    best = saccade.calibrate(model, "cskv", BATCHES)
    # over all batches: no factors of this rank lose less than those in closed form
    before, after, least = (sum(_loss_on(plan, i) for i in range(3)) for plan in (start(), trained, best))
    assert least <= after < 0.9 * before and log[0]["loss"] > log[-1]["loss"]
    with saccade.attach(model, cache="cskv(window=4)", plan=trained):
        assert model.generate(tokens(1, 60), max_new_tokens=6, do_sample=False).shape == (1, 66)


def _loss_on(plan: Plan, index: int) -> float:
    log: list[dict[str, float]] = []
    train_factors(tiny("llama"), [BATCHES[index]], plan, steps=1, rate=0.0, progress=log.append)
    return log[0]["loss"]


def test_the_loss_is_the_error_of_keys_before_rope_and_of_values() -> None:
    model, plan, wanted = tiny("llama"), start(), 0.0
    with torch.no_grad(), capture(model) as layers:
        model(BATCHES[0], use_cache=False)
    for own in layers:
        for name, x in (("key", unturned(own.k, rotary_of(model, own.layer))), ("value", own.v)):
            y = beside(x)
            wanted += float((y @ plan.tensor(own.layer, f"{name}_down") @ plan.tensor(own.layer, f"{name}_up") - y).square().mean())
    assert losses(plan) == pytest.approx(wanted, rel=1e-4)


def test_codes_in_few_bits_are_trained_through_their_rounding() -> None:
    model, spec = tiny("llama"), "cskv(bits=3, window=16)"
    plan = start(spec)
    assert losses(plan) > 1.02 * losses(start())
    trained = train_factors(model, (BATCHES[i % 3] for i in range(60)), plan, steps=60, rate=5e-3)
    assert losses(trained) < 0.95 * losses(plan)
    codes = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    read = straight_through(codes, Packed.of(codes.detach().unsqueeze(1), 2, group=5))
    read.sum().backward()
    assert codes.grad is not None and bool((codes.grad == 1).all()) and float((read - codes).detach().abs().max()) > 0.1


def test_unfit_models_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="has no linear k_proj and v_proj"):
        asvd_plan(tiny("gpt-neox"), BATCHES)
    with pytest.raises(ValueError, match="normalises what k_proj gives"):
        asvd_plan(tiny("qwen3"), BATCHES)
    with pytest.raises(ValueError, match="at least one"):
        asvd_plan(tiny("llama"), [])
    with pytest.raises(ValueError, match="think has no factors"):
        asvd_plan(tiny("llama"), BATCHES, "think")
    with pytest.raises(ValueError, match="ended after 3 of 5"):
        train_factors(tiny("llama"), BATCHES, start(), steps=5)
