"""Attention transfer on the pocket model: learned hedgehog maps come nearer to softmax than elu + 1 and relu, in every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saccade
from saccade.evaluate.conversion import lessons
from saccade.evaluate.text import words
from saccade.train.convert import ConvertConfig, transfer, transfer_losses
from saccade.train.corpus import load_corpus
from saccade.train.swap import swap, taught_parameters

CONTEXT, STEPS = 128, 14


@pytest.mark.slow
def test_hedgehog_maps_transfer_better_than_fixed_ones(tmp_path: Path):
    torch.set_num_threads(1)
    model, tokenizer = saccade.pocket(dtype=torch.float32)
    model.requires_grad_(False)
    text = load_corpus(2.0)[0]
    batches = lessons(tokenizer, text, words(text), CONTEXT, seed=0)
    held_out: Tensor = batches(10**6, 2)
    found: dict[str, Tensor] = {}

    def error(student: Any) -> Tensor:
        return torch.tensor(transfer_losses(model, student, held_out, lambda loss: None))

    for name in ("elu+1", "relu"):
        student = swap(model, f"lolcats(window=0, feature_map={name!r})")
        assert not taught_parameters(student)  # there is nothing to learn in these
        found[name] = error(student)
    student = swap(model, "lolcats(window=0)")
    untaught = error(student)
    config = ConvertConfig(to="lolcats(window=0)", out=tmp_path, transfer_steps=STEPS, batch=1, rows=1)
    transfer(model, student, batches, config)
    found["hedgehog"] = error(student)

    means = {name: float(losses.mean()) for name, losses in found.items()}
    assert len(found["hedgehog"]) == 8
    for fixed in ("elu+1", "relu"):
        assert means["hedgehog"] < 0.9 * means[fixed], means
        # the first layers have little to gain; none loses
        assert bool((found["hedgehog"] < found[fixed]).all()), found
    # it is the lessons that do it
    assert float(untaught.mean()) > min(means["elu+1"], means["relu"]) and bool((found["hedgehog"] < untaught).all()), untaught
