"""A step after 64K tokens costs what it costs after 1K, in bytes and in time."""

from __future__ import annotations

import time

import pytest
import torch

from saccade.core import MixerState, TokenMixer
from saccade.methods import build_mixer
from tests.contract.test_mixers import FIRST, ONE_WAY, layer, tokens

SHORT, LONG, PIECE = 1024, 65536, 8192
STEPS, ROUNDS = 8, 12
CONSTANT = [spec for spec in ONE_WAY if spec in FIRST and "constant" not in build_mixer(spec).info.opts_out]


def after(mixer: TokenMixer, n: int) -> MixerState:
    """The state that n tokens leave, given in pieces."""
    state = None
    for begin in range(0, n, PIECE):
        state = mixer(tokens(b=1, n=min(PIECE, n - begin), seed=begin, dtype=torch.float32), state)[1]
    assert state is not None
    return state


def milliseconds(mixer: TokenMixer, state: MixerState) -> float:
    """Of a step, over a few of them, from a copy of the state."""
    state, x = state.copy(), tokens(b=1, n=1, seed=1, dtype=torch.float32)
    began = time.perf_counter()
    for _ in range(STEPS):
        state = mixer(x, state)[1]
    return (time.perf_counter() - began) * 1000 / STEPS


@pytest.mark.slow
@pytest.mark.parametrize("spec", CONSTANT)
@torch.no_grad()
def test_a_step_is_the_same_after_64k_tokens(spec: str):
    mixer = layer(spec, torch.float32)
    states = {n: after(mixer, n) for n in (SHORT, LONG)}
    assert states[SHORT].nbytes == states[LONG].nbytes and int(states[LONG].position) == LONG
    milliseconds(mixer, states[LONG])
    # in turns, so that a machine whose speed drifts favours none, and the best of each, which other work delays least
    rounds = [[milliseconds(mixer, state) for state in states.values()] for _ in range(ROUNDS)]
    early, late = (min(times) for times in zip(*rounds, strict=True))
    assert late / early < 1.25
