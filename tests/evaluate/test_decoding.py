"""One sample through a model: what is compressed when, what stops an answer, what dense attention scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.evaluate.conftest import Ends
from transformers import PreTrainedModel

from saccade.attach import attach
from saccade.evaluate.decoding import Mode, Outcome, run_sample
from saccade.evaluate.prompts import Codec, Prompt, prompt_of
from saccade.evaluate.score import bits_per_byte
from saccade.evaluate.tasks import build
from saccade.evaluate.text import grammar

Pocket = tuple[PreTrainedModel, Any]


def made(codec: Codec, spec: str, length: int, index: int = 0) -> Prompt:
    return prompt_of(build(spec), codec, grammar(), length=length, seed=0, index=index)


def run(pocket: Pocket, codec: Codec, prompt: Prompt, mode: Mode = "aware", **methods: Any) -> Outcome:
    if not methods:
        return run_sample(pocket[0], codec, prompt, mode, None)
    with attach(pocket[0], **methods) as handle:
        return run_sample(pocket[0], codec, prompt, mode, handle)


@pytest.mark.parametrize("spec", ["needle", "needle-multikey", "dictionary", "copy(answer=24)", "two-facts"])
def test_the_pocket_model_solves_what_it_was_trained_on(pocket: Pocket, codec: Codec, spec: str) -> None:
    assert run(pocket, codec, made(codec, spec, 1024)).score >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "least", "most"),
    [
        ("needle", 0.9, 1.0),
        ("needle-multikey", 0.9, 1.0),
        ("needle-multivalue", 0.6, 1.0),
        ("needle-multiquery", 0.9, 1.0),
        ("dictionary", 0.9, 1.0),
        ("copy", 0.85, 1.0),
        ("two-facts", 0.8, 1.0),
        ("text", 0.4, 1.2),
        ("variables(chains=1)", 0.8, 1.0),
        ("variables", 0.8, 1.0),
        ("common-words", 0.0, 0.2),
        ("frequent-words", 0.0, 0.2),
    ],
)
def test_the_pocket_model_scores_as_documented(pocket: Pocket, codec: Codec, spec: str, least: float, most: float) -> None:
    scores = [run(pocket, codec, made(codec, spec, 1024, index)).score for index in range(8)]
    assert least <= sum(scores) / 8 <= most


@pytest.mark.parametrize("mode", ["aware", "agnostic"])
def test_only_a_query_aware_policy_sees_the_question(pocket: Pocket, codec: Codec, mode: Mode) -> None:
    prompt = made(codec, "needle", 300)
    policy = Ends(acted=[])
    outcome = run(pocket, codec, prompt, mode, cache=policy)
    seen = 300 if mode == "aware" else len(prompt.context)
    assert policy.acted == [(layer, seen) for layer in range(8)], "it acts once in a sample, in every layer"
    kept = 68 / seen
    assert outcome.kv_bytes == pytest.approx(kept * seen * 8 * 2 * 2 * 64 * 4)
    assert outcome.prefill_density == pytest.approx(1.0 if mode == "aware" else outcome.prefill_density)


def test_what_follows_the_compression_is_kept(pocket: Pocket, codec: Codec) -> None:
    prompt = made(codec, "needle", 300)
    policy = Ends(acted=[], first=4, last=32)
    with attach(pocket[0], cache=policy) as handle:
        outcome = run_sample(pocket[0], codec, prompt, "agnostic", handle)
        stats = handle.stats()
    fed = len(prompt.question) + len(outcome.steps)
    assert {n for layer in stats.kept for n in layer} == {36 + fed}
    # dense attention over what is left and over the question, none over what was dropped
    assert outcome.decode_density == pytest.approx((36 + fed) / (len(prompt.context) + fed), abs=0.02)


def test_modes_agree_when_nothing_is_dropped(pocket: Pocket, codec: Codec) -> None:
    prompt = made(codec, "needle-multikey", 500)
    plain = run(pocket, codec, prompt)
    assert run(pocket, codec, prompt, "agnostic").outputs == plain.outputs
    for mode in ("aware", "agnostic"):
        assert run(pocket, codec, prompt, mode, cache="random(budget=1.0)").outputs == plain.outputs


def test_followups_are_asked_after_the_models_own_answers(pocket: Pocket, codec: Codec) -> None:
    prompt = made(codec, "two-facts", 700)
    fed: list[bytes] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        fed.append(codec.decode(kwargs["input_ids"][0].tolist()))

    hook = pocket[0].register_forward_pre_hook(spy, with_kwargs=True)
    outcome = run(pocket, codec, prompt)
    hook.remove()
    bridge = outcome.outputs[0].strip()
    assert len(outcome.outputs) == 2
    followup = next(text for text in fed[1:] if len(text) > 1)
    assert followup.endswith(prompt.sample.followups[0].replace(b"{answer}", bridge))
    # every byte of the sequence was fed once and in order
    answered = b"".join(fed)[len(prompt.sample.context + prompt.sample.question) :]
    assert answered.startswith(outcome.outputs[0])


def test_an_output_ends_at_its_stop_and_at_its_length(pocket: Pocket, codec: Codec) -> None:
    prompt = made(codec, "needle", 600)
    outcome = run(pocket, codec, prompt)
    assert outcome.outputs == list(prompt.sample.answers)
    # one step for each byte of the answer: the stop itself is the last prediction
    assert len(outcome.steps) == len(prompt.sample.answers[0])
    copied = run(pocket, codec, made(codec, "copy(answer=10)", 300))
    assert len(copied.outputs[0]) == 18 and len(copied.steps) == 17


def test_bits_per_byte_are_those_of_one_forward(pocket: Pocket, codec: Codec) -> None:
    model, _ = pocket
    prompt = made(codec, "text(answer=32)", 200)
    outcome = run(pocket, codec, prompt)
    answer = codec.encode(prompt.sample.answers[0])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.context + answer])).logits[0].double()
    nats = -logits.log_softmax(-1)[len(prompt.context) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).sum()
    assert outcome.score == pytest.approx(bits_per_byte(float(nats), 32), rel=1e-4)
    assert len(outcome.steps) == 31


def test_dense_bytes_are_those_of_the_cache(pocket: Pocket, codec: Codec) -> None:
    outcome = run(pocket, codec, made(codec, "needle", 300))
    assert outcome.kv_bytes == 300 * 8 * 2 * 2 * 64 * 4
    assert (outcome.prefill_density, outcome.decode_density, outcome.index_bytes) == (1.0, 1.0, 0)
    assert outcome.decode_ms is not None and outcome.prefill_ms > outcome.decode_ms > 0
