"""A sealed segment of entries that each stand for several tokens: the mean key and the mean value of what was dropped, and a count.

    logit of an entry = cap(scale q.k) + log(count)

so that it enters numerator and denominator of the softmax count times. Means are kept in float32 (float64 for float64), because more
tokens may be folded into them. Source: razorattention, arXiv 2407.15891, section 3.3.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from saccade.cache.segment import Rectangle, Segment
from saccade.core import Partial, over_groups


class CountedSegment(Segment):
    """keys `(B, H, 1, D)`, values `(B, H, 1, Dv)`: means. counts `(B, H, 1)` int64, 0 for a head that has dropped nothing. first, last
    `(B, H, 1)` int32: positions of the oldest and the newest token in it.
    """

    encoded = True

    def __init__(self, keys: Tensor, values: Tensor, counts: Tensor, first: Tensor, last: Tensor) -> None:
        self.keys, self.values, self.counts, self.first, self.last = keys, values, counts, first, last

    @classmethod
    def folding(cls, old: CountedSegment | None, keys: Tensor, values: Tensor, positions: Tensor, gone: Tensor) -> CountedSegment:
        """One entry a head from the entries `gone`, bool `(B, H, n)`, of keys `(B, H, n, D)`, values and positions `(B, H, n)`, and from
        what `old` holds of earlier ones."""
        exact = torch.promote_types(keys.dtype, torch.float32)
        weights, counts = gone.to(exact).unsqueeze(2), gone.sum(-1, keepdim=True)
        far = torch.iinfo(positions.dtype).max
        first = positions.masked_fill(~gone, far).amin(-1, keepdim=True)
        last = positions.masked_fill(~gone, -1).amax(-1, keepdim=True)
        sums = [weights @ x.to(exact) for x in (keys, values)]
        if old is not None:
            sums = [new + x * old.counts.unsqueeze(-1) for new, x in zip(sums, (old.keys, old.values), strict=True)]
            counts, first, last = counts + old.counts, torch.minimum(first, old.first), torch.maximum(last, old.last)
        means = [x / counts.clamp(min=1).unsqueeze(-1) for x in sums]
        return cls(means[0], means[1], counts, first, last)

    @property
    def length(self) -> int:
        return int(bool((self.counts > 0).any()))

    def lengths(self) -> list[list[int]]:
        return (self.counts[..., 0] > 0).long().tolist()

    @property
    def kv_bytes(self) -> int:
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def side_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.counts, self.first, self.last))

    def read(self, begin: int, end: int) -> Rectangle:
        """The means as they are; `side["count"]` says how many tokens each stands for."""
        if (begin, end) != (0, 1):
            raise ValueError(f"slots {begin} to {end} are not in a segment of one entry a head")
        there = self.counts > 0
        return Rectangle(self.keys, self.values, {"positions": self.last, "count": self.counts}, None if bool(there.all()) else there)

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        exact = torch.promote_types(q.dtype, torch.float32)
        heads = self.keys.shape[1]
        logits = over_groups(q.to(exact).unflatten(1, (heads, -1)), self.keys.to(exact).mT).squeeze(-1) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        # log 0 = -inf: a head that has dropped nothing reads nothing here
        lse = (logits + self.counts.to(exact).log().unsqueeze(-1)).flatten(1, 2)
        out = self.values.to(q.dtype).unsqueeze(2).expand(-1, -1, q.shape[1] // heads, q.shape[2], -1).flatten(1, 2)
        return Partial(torch.where((lse > -torch.inf).unsqueeze(-1), out, 0.0), lse)

    def take_rows(self, rows: Tensor) -> CountedSegment:
        rows = rows.to(self.keys.device)
        return CountedSegment(*(x.index_select(0, rows) for x in (self.keys, self.values, self.counts, self.first, self.last)))

    def bound_to(self, row: int | None) -> CountedSegment:
        new = copy.copy(self)
        new.row = row
        return new

    def before(self, position: int) -> CountedSegment:
        """The means stay, for what went into them can't be told apart; they count for the tokens before `position` only."""
        new = copy.copy(self)
        new.counts = torch.minimum(self.counts, (position - self.first.long()).clamp(min=0))
        new.last = self.last.clamp(max=position - 1)
        return new
