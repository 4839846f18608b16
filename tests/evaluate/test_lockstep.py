"""Batches that are fed their right answers: the same scores as greedy decoding, one prompt at a time."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from transformers import PreTrainedModel

import saccade
from saccade.evaluate.decoding import Mode, run_sample
from saccade.evaluate.lockstep import Together, aligned_prompts, batches, check_task, run_together
from saccade.evaluate.prompts import Codec, Prompt
from saccade.evaluate.tasks import build
from saccade.evaluate.text import grammar
from saccade.methods import build_combination

Model = tuple[PreTrainedModel, Any]
LENGTH = 700


def prompts_of(codec: Codec, task: str, samples: int = 4, length: int = LENGTH, seed: int = 0) -> list[Prompt]:
    return aligned_prompts(build(task), codec, grammar(None), length=length, seed=seed, samples=samples)


def together(model: PreTrainedModel, codec: Codec, prompts: list[Prompt], spec: str, mode: Mode = "aware", step: int = 1) -> Together:
    methods: dict[str, Any] = build_combination(spec)
    with saccade.attach(model, **methods) if methods else nullcontext() as session:
        return run_together(model, codec, prompts, mode, session, step=step)


@pytest.mark.parametrize("task", ["needle", "dictionary", "variables", "needle-multiquery(needles=2)"])
def test_prompts_of_a_cell_fit_one_batch(codec: Codec, task: str) -> None:
    prompts = prompts_of(codec, task, samples=5)
    assert {prompt.length for prompt in prompts} == {LENGTH} and len(batches(prompts)) == 1
    for prompt in prompts:
        assert codec.decode(prompt.question).lstrip(b"\n") == prompt.sample.question.lstrip(b"\n")
        assert prompt.sample.answers[0] in prompt.sample.context, "the fact is still in the shorter text"
    again = prompts_of(codec, task, samples=3)
    assert [p.context for p in again[:1]] == [p.context for p in prompts[:1]] or len(again[0].question) != len(prompts[0].question)
    assert prompts_of(codec, task, seed=1)[0].context != prompts[0].context


@pytest.mark.parametrize(("spec", "mode"), [
    ("dense", "aware"), ("snapkv(budget=0.3)", "aware"), ("snapkv(budget=0.1)", "agnostic"), ("random(budget=0.5)", "aware"),
])  # fmt: skip
@pytest.mark.slow
def test_scores_are_those_of_greedy_decoding(pocket: Model, codec: Codec, spec: str, mode: Mode) -> None:
    model = pocket[0]
    prompts = prompts_of(codec, "needle", samples=3)
    found = together(model, codec, prompts, spec, mode)
    methods: dict[str, Any] = build_combination(spec)
    with saccade.attach(model, **methods) if methods else nullcontext() as session:
        alone = [run_sample(model, codec, prompt, mode, session) for prompt in prompts]
    assert found.scores == [[one.score] for one in alone]
    # the same bytes a row, and the same share read (fewer steps are run where no row can be right any more)
    assert found.kv_bytes == pytest.approx(alone[0].kv_bytes, rel=0.07)
    assert found.decode_density == pytest.approx(alone[0].decode_density, rel=0.05)


def test_bits_per_byte_are_those_of_single_steps(pocket: Model, codec: Codec) -> None:
    prompts = prompts_of(codec, "text(answer=24)", samples=2, length=300)
    for step in (1, 16):
        found = together(pocket[0], codec, prompts, "dense", step=step)
        for row, prompt in zip(found.scores, prompts, strict=True):
            assert row == [pytest.approx(run_sample(pocket[0], codec, prompt, "aware", None).score, rel=1e-4)]


@pytest.mark.parametrize("spec", ["dense", "quest(budget=0.1, dense_layers=0)", "swat(window=64, slopes='none', weights='softmax')"])
@pytest.mark.slow
def test_tokens_fed_at_once_are_decoded_one_by_one(pocket: Model, codec: Codec, spec: str) -> None:
    prompts = prompts_of(codec, "needle", samples=3)
    one, many = (together(pocket[0], codec, prompts, spec, step=step) for step in (1, 16))
    assert one.scores == many.scores
    if spec == "dense":
        assert one.scores == [[1.0]] * 3
    assert one.decode_density == pytest.approx(many.decode_density, rel=0.01)


@pytest.mark.slow
def test_several_questions_are_asked_in_turn(pocket: Model, codec: Codec) -> None:
    prompts = prompts_of(codec, "needle-multiquery(needles=2)", samples=3)
    assert together(pocket[0], codec, prompts, "dense").scores == [[1.0, 1.0]] * 3
    # what the first question alone votes for holds few of the second one's facts
    scores = together(pocket[0], codec, prompts, "snapkv(budget=0.3, window=64, kernel=31)").scores
    first, second = (sum(row[turn] for row in scores) for turn in (0, 1))
    assert all(len(row) == 2 for row in scores) and first > second


def test_tasks_without_one_right_answer_are_refused() -> None:
    assert check_task("needle(depths=(0.5,))").name == "needle"
    with pytest.raises(ValueError, match="task copy is not scored by exact match"):
        check_task("copy")
