"""A fixed number of probe queries: the same ones however the prompt is cut."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.parts.fixed_probes import FixedProbes


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 20), st.integers(0, 2**40))
def test_probes_do_not_depend_on_chunks(chunks: list[int], recent: int, drawn: int, seed: int) -> None:
    n = sum(chunks)
    q = torch.arange(float(n)).view(1, 1, n, 1)
    whole, parts = FixedProbes(recent, drawn, seed), FixedProbes(recent, drawn, seed)
    whole.add(q, n)
    begin = 0
    for m in chunks:
        begin += m
        parts.add(q[:, :, begin - m : begin], begin)
        assert parts.queries is not None and parts.queries.shape[2] <= recent + drawn + 16
    (a, slots), (b, others) = whole.rows(n, n), parts.rows(n, n)
    assert a is not None and b is not None
    assert torch.equal(slots, others) and torch.equal(a, b)
    assert a.flatten().tolist() == slots.tolist()
    assert len(slots) == min(n, recent + drawn) and slots.tolist()[-min(n, recent) :] == list(range(max(0, n - recent), n))


def test_taking_guesses_back_leaves_the_probes_of_the_rest() -> None:
    q = torch.arange(200.0).view(1, 1, 200, 1)
    straight, guessed = FixedProbes(8, 8, 0), FixedProbes(8, 8, 0)
    straight.add(q[:, :, :150], 150)
    guessed.add(torch.cat([q[:, :, :150], -torch.ones(1, 1, 16, 1)], 2), 166)  # guesses at the end of the prompt
    for a, b in zip(straight.rows(150, 150), guessed.rows(150, 150), strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    guessed.add(q[:, :, 150:152], 152)
    _, slots = guessed.rows(152, 100)
    assert slots.tolist()[-8:] == list(range(92, 100)) and bool((slots >= 0).all())


def test_the_draw_differs_by_seed_and_covers_the_sequence() -> None:
    q = torch.zeros(2, 1, 4000, 1)
    found = []
    for seed in range(4):
        probes = FixedProbes(10, 50, seed)
        probes.add(q, 4000)
        found.append(probes.rows(4000, 4000)[1][:50])
        alone, _ = probes.reorder(torch.tensor([1])).rows(4000, 4000)
        assert alone is not None and alone.shape == (1, 1, 60, 1)
        assert probes.nbytes == 2 * 76 * 4
    for slots in found:
        assert 1300 < float(slots.double().mean()) < 2700
    assert not torch.equal(found[0], found[1])


def test_without_queries_there_are_no_probes() -> None:
    rows, slots = FixedProbes(4, 4, 0).rows(10, 10)
    assert rows is None and slots.numel() == 0
