"""The newest queries of a sequence by place, and the mean of those that follow a token, which say how much it will be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.growing import Growing

SLACK = 64  # queries kept beyond what is needed: tokens may be taken back


class RecentRows:
    """Rows `(B, H, w, D)` of the places begin ... end - 1; at least the newest `keep` and SLACK more stay."""

    def __init__(self, keep: int) -> None:
        self.keep, self.begin = keep, 0
        self.rows: Growing | None = None

    @property
    def end(self) -> int:
        return self.begin + (0 if self.rows is None else self.rows.n)

    @property
    def nbytes(self) -> int:
        return 0 if self.rows is None else self.rows.nbytes

    def append(self, new: Tensor, place: int) -> None:
        """Rows of the places from `place` on; what was kept of these places is forgotten."""
        if self.rows is None or not self.begin <= place <= self.end:
            self.begin, self.rows = place, Growing(new.clone())
            return
        self.rows.truncate(place - self.begin)
        self.rows.append(new)
        wanted = min(self.keep + SLACK, self.rows.n)
        if self.rows.n > 2 * wanted:
            self.begin += self.rows.n - wanted
            self.rows = Growing(self.rows.view[:, :, self.rows.n - wanted :].clone())

    def part(self, begin: int, end: int) -> Tensor | None:
        """Rows of the places begin ... end - 1; None unless all are kept."""
        if self.rows is None or begin < self.begin or end > self.end:
            return None
        return self.rows.view[:, :, begin - self.begin : end - self.begin]

    def mean_after(self, begin: int, end: int, reach: int) -> Tensor:
        """For each place p from begin to end - 1 the mean of the kept rows p + 1 ... p + reach - 1, `(B, H, m, D)`; 0 where none is.

        Raises ValueError where no row was kept.
        """
        if self.rows is None:
            raise ValueError(
                f"no query of the tokens before place {end} was seen, as in a cache that was filled elsewhere: run the prompt through the "
                "model while the method is attached"
            )
        first, last = (min(max(place - self.begin, 0), self.rows.n) for place in (begin + 1, end + reach - 1))
        sums = torch.nn.functional.pad(self.rows.view[:, :, first:last].to(torch.float64).cumsum(2), (0, 0, 1, 0))
        places = torch.arange(begin, end, device=sums.device) - self.begin - first
        low, high = ((places + step).clamp(0, last - first) for step in (1, reach))
        return (sums[:, :, high] - sums[:, :, low]) / (high - low).clamp(min=1).unsqueeze(-1)

    def reorder(self, rows: Tensor) -> RecentRows:
        """A copy with these batch rows."""
        new = RecentRows(self.keep)
        new.begin, new.rows = self.begin, None if self.rows is None else self.rows.reorder(rows)
        return new
