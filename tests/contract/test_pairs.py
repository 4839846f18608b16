"""Methods of different phases on one model: every allowed pair runs, and equals dense when both are opened."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

import saccade
from saccade.attach import Session
from tests.contract.harness import METHODS, greedy, info, llama, opened, plan, sparse, tokens

PAIRS = [(a, b) for a, b in combinations(sorted(METHODS), 2) if info(a).phase != info(b).phase]


def refused(a: str, b: str) -> bool:
    """A decode method picks single entries, which an encoding cache no longer has."""
    return {info(a).phase, info(b).phase} == {"cache", "decode"} and (info(a).encodes or info(b).encodes)


def both(a: str, b: str, spec: Callable[[str], str]) -> Session:
    specs = {info(slug).phase: spec(slug) for slug in (a, b)}
    plans = [found for s in specs.values() if (found := plan("llama", s, torch.float64)) is not None]
    return saccade.attach(llama(), **specs, plan=plans or None)


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda slug: slug)
def test_pair(a: str, b: str) -> None:
    model, ids = llama(), tokens(2, 70)
    ids[0, :9] = 0
    mask = (ids > 0).long()
    if refused(a, b):
        with pytest.raises(ValueError, match="use one of the two"):
            both(a, b, sparse)
        return
    dense = greedy(model, ids, 6, attention_mask=mask)
    with both(a, b, opened):
        assert torch.equal(greedy(model, ids, 6, attention_mask=mask), dense)
    with both(a, b, sparse) as handle:
        assert greedy(model, ids, 6, attention_mask=mask).shape == dense.shape
        stats = handle.stats()
    if "decode" in (info(a).phase, info(b).phase):
        assert stats.decode_density is not None and stats.decode_density < 0.95
    if "prefill" in (info(a).phase, info(b).phase):
        assert stats.prefill_density is not None and stats.prefill_density < 1
