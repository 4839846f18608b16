"""Cutting a stretch of text where its attention map shows dark triangles along the diagonal.

    S(x, y) = sum_{i = x}^{y} sum_{j = x}^{i} (A_ij - theta)

is positive where the tokens of a span attend to each other more than theta on average; all S come from two-dimensional prefix sums. The
spans with the highest S stay, without those that overlap a better one by more than an IoU. Of spans that still overlap the better one
takes the tokens; runs of tokens that no span took become spans of their own.

Source: ltri-llm, arXiv 2412.04757. How overlaps and gaps are settled is chosen here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def triangle_scores(attention: Tensor, theta: float, longest: int) -> Tensor:
    """S of the spans of l tokens from x on in a causal map `(..., n, n)`: entry `[..., x, l - 1]` of `(..., n, min(longest, n))` float64.

    -inf for spans that would end after the map.
    """
    n = attention.shape[-1]
    sums = torch.nn.functional.pad(attention.to(torch.float64).tril().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    lengths = torch.arange(1, min(longest, n) + 1, device=attention.device)
    first = torch.arange(n, device=attention.device).unsqueeze(-1)
    last = (first + lengths).clamp(max=n)
    # entries above the diagonal are 0, so the square over a span is its triangle
    square = sums[..., last, last] - sums[..., first, last] - sums[..., last, first] + sums[..., first, first]
    entries = (lengths * (lengths + 1) / 2).to(torch.float64)
    return (square - theta * entries).masked_fill(first + lengths > n, -torch.inf)


def span_starts(scores: Tensor, iou: float) -> Tensor:
    """Where the spans that tile n tokens begin, bool `(n,)`, from the scores `(n, longest)` of `triangle_scores`.

    Ties go to the lower start, then to the shorter span. No span is longer than `longest`.
    """
    n, longest = scores.shape
    first = torch.arange(n, device=scores.device).unsqueeze(-1)
    last = first + torch.arange(1, longest + 1, device=scores.device)
    alive = torch.where(scores > 0, scores, -torch.inf)
    owner = torch.full((n,), -1, device=scores.device)
    rank = 0
    while bool((alive > -torch.inf).any()):
        x, length = divmod(int(alive.argmax()), longest)
        y = x + length + 1
        free = owner[x:y] < 0
        owner[x:y] = torch.where(free, rank, owner[x:y])
        rank += 1
        both = (last.clamp(max=y) - first.clamp(min=x)).clamp(min=0)
        alive = alive.masked_fill(both > iou * (last - first + y - x - both), -torch.inf)
        alive[x, length] = -torch.inf
    begins = torch.nn.functional.pad(owner[1:] != owner[:-1], (1, 0), value=True)
    # a gap longer than a span may be is cut
    places = torch.arange(n, device=scores.device)
    since = places - torch.where(begins, places, 0).cummax(0).values
    return begins | (since % longest == 0)


def inner_attention(attention: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Attention that each token received from the rows of its span: `(spans, n)` float64, -inf outside; starts, ends `(spans,)`."""
    sums = torch.nn.functional.pad(attention.to(torch.float64).cumsum(-2), (0, 0, 1, 0))
    places = torch.arange(attention.shape[-1], device=attention.device)
    inside = (places >= starts.unsqueeze(-1)) & (places < ends.unsqueeze(-1))
    return (sums[ends] - sums[starts]).masked_fill(~inside, -torch.inf)


def confidence(scores: Tensor) -> Tensor:
    """Triangle scores of neighbouring spans `(spans,)` relative to those beside them, in [0, 1]: 1/2 where they are alike."""
    positive = scores.clamp(min=0)
    beside = torch.nn.functional.pad(positive, (1, 1))
    count = torch.full_like(positive, 2.0)
    count[0] -= 1
    count[-1] -= 1
    total = positive + (beside[:-2] + beside[2:]) / count.clamp(min=1)
    return torch.where(total > 0, positive / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
