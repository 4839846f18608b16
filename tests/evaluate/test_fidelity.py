"""Errors, masses and pictures against what is worked out directly from captured queries and keys."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import torch
from tests.evaluate.conftest import Broken, Ends, Near
from transformers import PreTrainedModel

from saccade.attach import capture
from saccade.evaluate.contenders import Contender, contender, line_up
from saccade.evaluate.fidelity import measure
from saccade.evaluate.picture import picture
from saccade.evaluate.prompts import Codec, prompt_of
from saccade.evaluate.tasks import build
from saccade.evaluate.text import grammar

Pocket = tuple[PreTrainedModel, Any]
PROMPT = 200


@pytest.fixture(scope="module")
def ids(codec: Codec) -> list[int]:
    prompt = prompt_of(build("text(answer=32)"), codec, grammar(), length=PROMPT, seed=0, index=0)
    return [*prompt.context, *codec.encode(prompt.sample.answers[0])[:10]]


@pytest.fixture(scope="module")
def weights(pocket: Pocket, ids: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Attention probabilities `(Hq, N, N)`, values `(Hq, N, D)` and outputs of every layer."""
    with capture(pocket[0]) as layers, torch.no_grad():
        pocket[0](input_ids=torch.tensor([ids]), use_cache=False)
    hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
    maps = []
    for layer in layers:
        logits = layer.q[0] @ layer.k[0].repeat_interleave(3, 0).mT * layer.scale
        maps.append(logits.masked_fill(hidden, -torch.inf).softmax(-1))
    return maps, [layer.v[0].repeat_interleave(3, 0) for layer in layers], [layer.out[0] for layer in layers]


def own(policy: Any, phase: str = "cache") -> Contender:
    return Contender(policy.info.slug, policy.info.slug, {phase: policy})


def test_open_methods_have_no_error_and_all_the_mass(pocket: Pocket, ids: list[int]) -> None:
    specs = ["random(budget=1.0)", "quest(budget=1.0)", "minference+random(budget=1.0)"]
    found = measure(pocket[0], ids, PROMPT, [contender(spec) for spec in specs])
    assert list(found) == specs
    for fidelity in found.values():
        assert fidelity.broken is None
        assert len(fidelity.output_error) == len(fidelity.mass) == 8
        assert max(fidelity.output_error) < 1e-5
        assert min(fidelity.mass) > 1 - 1e-5


def test_a_cache_policy_is_measured_on_the_queries_after_the_prompt(
    pocket: Pocket, ids: list[int], weights: tuple[list[torch.Tensor], ...]
) -> None:
    found = measure(pocket[0], ids, PROMPT, [own(Ends(first=4, last=64))])["test-ends"]
    maps, values, outputs = weights
    kept = torch.zeros(len(ids), dtype=torch.bool)
    kept[:4], kept[PROMPT - 64 :] = True, True
    for layer in range(8):
        rows = maps[layer][:, PROMPT:] * kept
        mass = rows.sum(-1)
        out = rows @ values[layer] / mass.unsqueeze(-1)
        dense = outputs[layer][:, PROMPT:]
        assert found.mass[layer] == pytest.approx(float(mass.mean()), abs=1e-5)
        assert found.output_error[layer] == pytest.approx(float((out - dense).norm() / dense.norm()), abs=1e-4)
    assert max(found.output_error) > 0.1 and min(found.mass) < 0.9, "a window of 68 of 200 tokens loses something here"


def test_a_prefill_method_is_measured_on_the_prompts_queries(
    pocket: Pocket, ids: list[int], weights: tuple[list[torch.Tensor], ...]
) -> None:
    found = measure(pocket[0], ids, PROMPT, [own(Near(size=16), "prefill")])["test-near"]
    maps, values, outputs = weights
    near = torch.ones(PROMPT, PROMPT, dtype=torch.bool).tril().triu(-15)
    for layer in range(8):
        rows = maps[layer][:, :PROMPT, :PROMPT] * near
        mass = rows.sum(-1)
        out = rows @ values[layer][:, :PROMPT] / mass.unsqueeze(-1)
        dense = outputs[layer][:, :PROMPT]
        assert found.mass[layer] == pytest.approx(float(mass.mean()), abs=1e-5)
        assert found.output_error[layer] == pytest.approx(float((out - dense).norm() / dense.norm()), abs=1e-4)


def test_a_combination_is_measured_where_its_cache_policy_acts(pocket: Pocket, ids: list[int]) -> None:
    policy = Ends(first=4, last=64)
    both = Contender("both", "both", {"prefill": Near(), "cache": policy})
    found = measure(pocket[0], ids, PROMPT, [own(policy), both])
    # every layer is given dense attention's inputs, so the prefill method leaves no trace in the cache
    assert found["both"].output_error == pytest.approx(found["test-ends"].output_error)
    assert found["both"].mass == pytest.approx(found["test-ends"].mass)


def test_more_budget_means_less_error(pocket: Pocket, ids: list[int]) -> None:
    found = measure(pocket[0], ids, PROMPT, [contender(f"random(budget={b})") for b in (0.25, 0.5, 0.9)])
    errors = [sum(fidelity.output_error) for fidelity in found.values()]
    masses = [sum(fidelity.mass) for fidelity in found.values()]
    assert errors == sorted(errors, reverse=True) and masses == sorted(masses)


def test_a_failing_method_costs_the_others_nothing(pocket: Pocket, ids: list[int]) -> None:
    found = measure(pocket[0], ids, PROMPT, [own(Broken()), contender("random"), contender("dense")])
    assert found["test-broken"].broken == "RuntimeError: this policy\nis broken"
    assert len(found["random"].mass) == 8
    assert "dense" not in found
    with pytest.raises(ValueError, match="at least one token must follow"):
        measure(pocket[0], ids, len(ids), [contender("random")])


def decoded(text: str, size: int) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text))).view(size, size)


def test_a_picture_shows_the_mass_and_what_is_kept(pocket: Pocket, ids: list[int], weights: tuple[list[torch.Tensor], ...]) -> None:
    line = [own(Ends(first=8, last=64)), contender("quest(budget=0.25, page_size=8)"), own(Broken())]
    drawn = picture(pocket[0], ids[:PROMPT], PROMPT, line, "hello")
    assert (drawn["length"], drawn["pool"], drawn["prompt"]) == (200, 8, "hello")
    assert drawn["failed"] == {"test-broken": "RuntimeError: this policy\nis broken"}
    assert [layer["layer"] for layer in drawn["layers"]] == list(range(8))
    head = drawn["layers"][4]["heads"][2]
    size = head["size"]
    assert (head["head"], head["kv_head"], size) == (2, 0, 25)
    # 255 is all of a query's attention, 0 a ten-thousandth of it or less
    own_map = weights[0][4][2][:200, :200] / weights[0][4][2][:200, :200].sum(-1, keepdim=True)
    mass = own_map.view(25, 8, 25, 8).sum(-1).mean(1)
    expected = (255 * (1 + mass.clamp(min=1e-4).log10() / 4)).round()
    assert (decoded(head["map"], size) - expected).abs().max() <= 1
    kept = decoded(head["selections"]["test-ends"], size)
    assert (kept[:, 0] == 255).all(), "the first key tile is kept and visible to all"
    assert (kept.triu(1) == 0).all() and (kept[:, 1:17] == 0).all()
    assert (kept.diagonal()[17:] == 255).all()
    chosen = torch.zeros(200, dtype=torch.bool)
    chosen[:8], chosen[-64:] = True, True
    seen = chosen & torch.ones(200, 200, dtype=torch.bool).tril()
    assert head["density"]["test-ends"] == pytest.approx(float(seen.sum() / (200 * 201 / 2)))
    assert head["mass"]["test-ends"] == pytest.approx(float((own_map * seen).sum(-1).mean()), abs=1e-5)
    quest = next(spec for spec in head["selections"] if spec.startswith("quest"))
    assert 0.1 < head["density"][quest] < 0.5 < head["mass"][quest] <= 1
    assert drawn["layers"][0]["heads"][0]["density"][quest] == pytest.approx(1.0), "its first two layers are dense"


def test_the_floor_takes_the_smallest_budget_of_the_cache_policies() -> None:
    def specs(methods: list[str], **options: Any) -> list[str]:
        return [found.spec for found in line_up(methods, [1024, 4096], **options)]

    assert specs(["snapkv(budget=0.5)", "h2o(budget=0.125)"]) == [
        "dense", "random(budget=0.125)", "snapkv(budget=0.5)", "h2o(budget=0.125)",
    ]  # fmt: skip
    # 128 of 1024 tokens are fewer than a quarter
    assert specs(["snapkv(budget=0.25)", "h2o(budget=128)"])[1] == "random(budget=128)"
    assert specs(["quest(budget=0.1)"])[1] == "random(budget=0.25)", "a decode method keeps everything"
    assert specs(["minference"]) == ["dense", "minference"]
    assert specs(["snapkv"], floor=False) == ["dense", "snapkv"]
    assert specs(["random(budget=0.5)", "snapkv"]) == ["dense", "random(budget=0.5)", "snapkv"]
    assert specs(["snapkv( budget = 0.5 )", "dense", "snapkv(budget=0.5)"])[2:] == ["snapkv(budget=0.5)"]
    with pytest.raises(ValueError, match="two cache methods"):
        specs(["snapkv+h2o"])


def test_what_is_chosen_among_encoded_entries_is_what_is_read(pocket: Pocket, ids: list[int]) -> None:
    alone, beside = "quest(budget=0.25, dense_layers=0)", "zipcache+quest(budget=0.25, dense_layers=0)"
    found = measure(pocket[0], ids, PROMPT, [contender(spec) for spec in (alone, beside)])
    assert all(fidelity.broken is None for fidelity in found.values())
    pairs = list(zip(found[beside].mass, found[alone].mass, strict=True))
    assert all(mass < 0.999 and abs(mass - other) < 0.1 for mass, other in pairs), "nearly the same pages, by restored keys"
