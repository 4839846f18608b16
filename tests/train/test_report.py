"""The report: exact scores from a model whose behaviour is known."""

from __future__ import annotations

import math
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saccade.models.pocket import pocket
from saccade.train import exams, report
from saccade.train.text import Grammar


class Oracle:
    """A model that knows the sequence, and errs where it is told to."""

    device = torch.device("cpu")

    def __init__(self, wrong: int | None = None) -> None:
        self.wrong = wrong  # a place, counted from the end, that it gets wrong

    def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, 320)
        logits.scatter_(2, ids.roll(-1, 1)[..., None], 5.0)
        logits[:, -1] = 0.0
        if self.wrong is not None:
            logits[:, -self.wrong] = 0.0
        return SimpleNamespace(logits=logits)


def test_score_counts_whole_answers_or_bytes(grammar: Grammar):
    pieces = exams.needles(grammar, Random(0), 400)
    assert report.score(Oracle(), pieces, 400, part=False) == 1.0
    assert report.score(Oracle(wrong=3), pieces, 400, part=False) == 0.0
    answer = max(pieces, key=lambda p: p.weight).text
    found = report.score(Oracle(wrong=3), pieces, 400, part=True)
    assert found == pytest.approx(1 - 1 / len(answer))


def test_bits_of_a_uniform_model(grammar: Grammar):
    class Uniform(Oracle):
        def __call__(self, ids: Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 320))

    assert report.bits_per_byte(Uniform(), grammar.text, 256, 3) == pytest.approx(math.log2(320))
    with pytest.raises(ValueError, match="do not fit"):
        report.bits_per_byte(Uniform(), b"short", 256, 3)


def test_shape_of_the_scores(grammar: Grammar):
    scores = report.exam_scores(Oracle(), grammar, lengths=(384,), samples=3)
    assert set(scores) == {"needle", "needle of four", "dictionary", "copy", "variables"}
    assert all(rows["384"]["score"] == 1.0 and rows["384"]["samples"] == 3 for rows in scores.values())
    assert set(scores["variables"]["384"]["groups"]) == {"hops 1", "hops 2", "hops 3"}


def test_head_roles_find_the_retrieval_heads(grammar: Grammar):
    model, _ = pocket(torch.float32, "cpu")
    roles = report.head_roles(model, grammar, 512)
    assert [len(row) for row in roles["retrieval"]] == [6] * 8 and model.config._attn_implementation == "sdpa"
    assert max(max(row) for row in roles["retrieval"]) > 0.5
