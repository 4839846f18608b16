"""Picking a fixed number of best units, and the Selection made of them."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.parts.pick import pick_best, read_pages, read_tokens


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 60), levels=st.sampled_from([1, 2, 5, 1000]), seed=st.integers(0, 999), data=st.data())
def test_the_best_and_of_equals_the_first(n: int, levels: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n + 2))
    scores = torch.randint(0, levels, (2, 3, n), generator=torch.Generator().manual_seed(seed)).float() - levels / 2
    got = pick_best(scores, count)
    assert got.shape == (2, 3, min(count, n))
    for row, ids in zip(scores.flatten(0, 1).tolist(), got.flatten(0, 1).tolist(), strict=True):
        want = sorted(sorted(range(n), key=lambda i: (-row[i], i))[:count])
        assert ids == want


def test_infinities_and_nan_are_picked_as_the_highest() -> None:
    scores = torch.tensor([[0.0, torch.nan, 2.0, torch.inf, -torch.inf], [-torch.inf] * 5])
    assert pick_best(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert pick_best(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_tokens_and_pages_become_selections() -> None:
    ids = torch.tensor([[[0, 3, 4], [1, 2, 4]]])
    tokens = read_tokens(ids, 9)
    want = torch.zeros(1, 2, 1, 9, dtype=torch.bool).scatter(-1, ids.unsqueeze(2), True)
    assert torch.equal(tokens.dense_mask(), want)
    pages = read_pages(ids, 2, 9)
    wide = want.repeat_interleave(2, dim=-1)[..., :9]
    assert torch.equal(pages.dense_mask(), wide) and pages.aligned and pages.block_k == 2
    assert abs(pages.density() - float(wide.double().mean())) < 1e-12
    assert abs(tokens.density() - 3 / 9) < 1e-12
