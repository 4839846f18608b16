"""Methods of different phases on one model, and cache policies in a row: every allowed pair runs, and equals dense when both are opened.

Pairs with a method that stands for its kind run every time, the others with the slow tests.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch

import saccade
from saccade.attach import Session
from saccade.core import Rebuilding
from saccade.methods import build
from tests.contract.harness import METHODS, SAME, error, greedy, info, llama, opened, plan, sparse, tokens

TYPICAL = {"minference", "snapkv", "zipcache", "quest"}


def pair(a: str, b: str) -> object:
    return pytest.param(a, b, marks=[] if TYPICAL & {a, b} else pytest.mark.slow)


PAIRS = [pair(a, b) for a, b in combinations(sorted(METHODS), 2) if info(a).phase != info(b).phase]
POLICIES = [slug for slug in sorted(METHODS) if info(slug).phase == "cache"]
ENCODERS = [slug for slug in sorted(METHODS) if info(slug).encodes and "decode" not in {info(slug).phase, *info(slug).also}]
OVER = [pair(a, b) for a in ENCODERS for b in sorted(METHODS) if info(b).reads_encoded]
ROWS = [pair(a, b) for a in POLICIES for b in POLICIES if a != b and info(b).encodes]


def refused(a: str, b: str) -> str | None:
    """Why a pair makes no sense: a decode method picks single entries of heads that hold equally many, and not all of them can read
    encoded ones; a phase has one method."""
    acts = {slug: {info(slug).phase, *info(slug).also} for slug in (a, b)}
    if acts[a] & acts[b]:
        return "acts on the .* phase too"
    for one, other in ((a, b), (b, a)):
        encoded = info(one).encodes and not info(other).reads_encoded
        if "cache" in acts[one] and "decode" in acts[other] and (encoded or info(one).ragged):
            return "use one of the two"
    return None


def both(a: str, b: str, spec: Callable[[str], str]) -> Session:
    specs = {info(slug).phase: spec(slug) for slug in (a, b)}
    return saccade.attach(llama(), **specs, plan=plans(*specs.values()))


def plans(*specs: str) -> list[saccade.Plan] | None:
    return [found for spec in specs if (found := plan("llama", spec, torch.float64)) is not None] or None


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda slug: slug)
def test_pair(a: str, b: str) -> None:
    model, ids = llama(), tokens(2, 70)
    ids[0, :9] = 0
    mask = (ids > 0).long()
    if why := refused(a, b):
        with pytest.raises(ValueError, match=why):
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


@pytest.mark.parametrize(("encoder", "decode"), OVER, ids=lambda slug: slug)
def test_decode_methods_read_encoded_entries(encoder: str, decode: str) -> None:
    """Opened it is the encoded cache alone; else it counts the pairs that it chose, and its choice is made of decoded keys."""
    ids = tokens(2, 70)
    ids[0, :9] = 0
    given = {"attention_mask": (ids > 0).long(), "output_logits": True, "return_dict_in_generate": True}
    ran, densities = [], []
    for spec in (None, opened(decode), sparse(decode)):
        specs = {info(encoder).phase: sparse(encoder)} | ({} if spec is None else {"decode": spec})
        with saccade.attach(llama(), **specs, plan=plans(*specs.values())) as handle:
            out: Any = greedy(llama(), ids, 6, **given)
            ran.append(torch.stack(out.logits))
            densities.append(handle.stats().decode_density)
            assert any(segment.encoded for segment in out.past_key_values.layers[0].segments), "nothing was encoded, so nothing is shown"
    assert error(ran[0], ran[1]) < SAME and bool(ran[2].isfinite().all())
    assert densities[2] < 0.95 * densities[1] and densities[1] == densities[0]


@pytest.mark.parametrize(("a", "b"), ROWS, ids=lambda slug: slug)
def test_policies_in_a_row(a: str, b: str) -> None:
    """What the first leaves is encoded by the second; opened they are dense, and together they hold no more than the first alone."""
    model, ids = llama(), tokens(2, 90)
    row = f"{sparse(a)}|{sparse(b)}"
    if info(a).encodes or info(a).ragged:
        with pytest.raises(ValueError, match="put it last" if info(a).encodes else "does not leave"):
            build(row)
        return
    if issubclass(METHODS[a], Rebuilding):
        with pytest.raises(ValueError, match="without other cache policies"):
            saccade.attach(model, cache=row, plan=plans(sparse(a), sparse(b)))
        return
    dense = greedy(model, ids, 6)
    with saccade.attach(model, cache=f"{opened(a)}|{opened(b)}", plan=plans(opened(a), opened(b))):
        assert torch.equal(greedy(model, ids, 6), dense)
    held = []
    for spec in (sparse(a), row):
        with saccade.attach(model, cache=spec, plan=plans(sparse(a), sparse(b))) as handle, torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            handle.compress()
            held.append(handle.stats())
            assert bool(model(ids[:, :1], past_key_values=cache).logits.isfinite().all())
    assert held[1].kv_bytes <= held[0].kv_bytes
