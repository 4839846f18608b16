"""Spans of a stretch: triangle scores by prefix sums, suppression, tiling, and confidence."""

from __future__ import annotations

import torch

from saccade.parts.spans import confidence, inner_attention, span_starts, triangle_scores


def test_scores_equal_sums_over_triangles() -> None:
    attention = torch.rand(2, 13, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = triangle_scores(attention, 0.3, 6)
    assert scores.shape == (2, 13, 6)
    for x in range(13):
        for length in range(1, 7):
            if x + length > 13:
                assert bool((scores[:, x, length - 1] == -torch.inf).all())
                continue
            want = sum(attention[:, i, j] - 0.3 for i in range(x, x + length) for j in range(x, i + 1))
            assert float((scores[:, x, length - 1] - want).abs().max()) < 1e-12


def test_a_span_no_longer_than_allowed_and_gaps_are_cut() -> None:
    nothing = torch.full((20, 6), -1.0)
    assert span_starts(nothing, 0.4).nonzero().flatten().tolist() == [0, 6, 12, 18]
    one = nothing.clone()
    one[7, 3] = 1.0  # tokens 7 ... 10
    assert span_starts(one, 0.4).nonzero().flatten().tolist() == [0, 6, 7, 11, 17]


def test_the_better_of_two_overlapping_spans_takes_the_tokens() -> None:
    scores = torch.full((12, 6), -1.0)
    scores[0, 5], scores[4, 5] = 2.0, 1.0  # 0 ... 5 and 4 ... 9: IoU 0.2
    assert span_starts(scores, 0.4).nonzero().flatten().tolist() == [0, 6, 10]
    assert span_starts(scores, 0.1).nonzero().flatten().tolist() == [0, 6]
    scores[0, 5] = 0.5
    assert span_starts(scores, 0.4).nonzero().flatten().tolist() == [0, 4, 10]


def test_attention_received_inside_a_span() -> None:
    attention = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)).tril()
    got = inner_attention(attention, torch.tensor([0, 4]), torch.tensor([4, 9]))
    for span, (x, y) in enumerate(((0, 4), (4, 9))):
        assert float((got[span, x:y] - attention[x:y, x:y].sum(0)).abs().max()) < 1e-6
        assert int((got[span] > -torch.inf).sum()) == y - x


def test_confidence_is_relative_to_the_neighbours() -> None:
    assert confidence(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]
    c = confidence(torch.tensor([1.0, 3.0, 1.0, -4.0])).tolist()
    assert c[1] == 0.75 and c[0] == 0.25 and c[3] == 0.0
    assert confidence(torch.tensor([5.0])).tolist() == [1.0] and confidence(torch.tensor([-1.0])).tolist() == [0.5]
