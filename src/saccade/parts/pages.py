"""Pages of keys and the range of every channel in them, kept up to date as keys arrive."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from saccade.ops.estimate import Reduce
from saccade.parts.dots import dots
from saccade.parts.growing import Growing


class PageBounds:
    """Channel-wise maximum and minimum of the keys in each page of `page_size` tokens (the last page may hold fewer).

    A page that is not full is bounded by the keys it has, so nothing stands in for the missing ones. n: tokens so
    far.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.n = 0
        self._bounds: Growing | None = None  # (B, Hk, pages, 2 D): maxima, then minima

    @property
    def pages(self) -> int:
        return 0 if self._bounds is None else self._bounds.n

    @property
    def nbytes(self) -> int:
        """Bytes held, room for the next pages included."""
        return 0 if self._bounds is None else self._bounds.nbytes

    @property
    def highest(self) -> Tensor:
        """`(B, Hk, pages, D)`: the maximum of each channel."""
        return self._content().unflatten(-1, (2, -1))[..., 0, :]

    @property
    def lowest(self) -> Tensor:
        """`(B, Hk, pages, D)`: the minimum of each channel."""
        return self._content().unflatten(-1, (2, -1))[..., 1, :]

    def append(self, keys: Tensor) -> None:
        """Take in keys `(B, Hk, m, D)` that follow those so far."""
        begun = min(-self.n % self.page_size, keys.shape[2])
        self.n += keys.shape[2]
        if begun:
            highest, lowest = self._content()[:, :, -1].unflatten(-1, (2, -1)).unbind(-2)
            first = keys[:, :, :begun]
            top, bottom = (first[:, :, 0], first[:, :, 0]) if begun == 1 else (first.amax(2), first.amin(2))
            torch.maximum(highest, top, out=highest)
            torch.minimum(lowest, bottom, out=lowest)
            keys = keys[:, :, begun:]
        if not keys.shape[2]:
            return
        whole = keys.shape[2] // self.page_size * self.page_size
        ranges = [_range(keys[:, :, :whole].unflatten(2, (-1, self.page_size)))] if whole else []
        if whole < keys.shape[2]:
            ranges.append(_range(keys[:, :, whole:].unsqueeze(2)))
        new = ranges[0] if len(ranges) == 1 else torch.cat(ranges, dim=2)
        if self._bounds is None:
            self._bounds = Growing(new)
        else:
            self._bounds.append(new)

    def upper_bound(self, q: Tensor, reduce: Reduce = "none") -> Tensor:
        """An upper bound of q.k over the keys of each page: `(B, Hq, pages)` float32 (float64), for q `(B, Hq, D)`; see `dots`.

        `sum_d max(q_d m_d, q_d M_d)`: a positive q_d takes the channel's maximum M_d, a negative one its minimum
        m_d, so it is one product of [max(q, 0), min(q, 0)] with [M, m].
        """
        least, most = _halves(q.device, q.dtype)
        return dots(q.unsqueeze(-2).clamp(least, most).flatten(-2), self._content(), reduce)

    def truncate(self, n: int) -> int:
        """Forget what came after the first n tokens; returns how many are still covered: only whole pages stay."""
        if n >= self.n:
            return self.n
        self.n = n // self.page_size * self.page_size
        if self._bounds is not None:
            self._bounds.truncate(self.n // self.page_size)
        return self.n

    def reorder(self, rows: Tensor) -> PageBounds:
        """A copy with these batch rows."""
        new = PageBounds(self.page_size)
        new.n = self.n
        new._bounds = None if self._bounds is None else self._bounds.reorder(rows)
        return new

    def _content(self) -> Tensor:
        if self._bounds is None:
            raise ValueError("these pages have no keys yet: append some before asking for bounds")
        return self._bounds.view


@lru_cache(maxsize=16)
def _halves(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Bounds `(2, 1)` that keep what is positive, and what is negative: one kernel for both."""
    with torch.inference_mode(False):
        numbers = torch.tensor([[0.0, torch.inf], [-torch.inf, 0.0]], device=device, dtype=dtype)
        return numbers[:, :1], numbers[:, 1:]


def _range(paged: Tensor) -> Tensor:
    """Maxima and minima `(B, Hk, pages, 2 D)` of keys `(B, Hk, pages, tokens, D)`."""
    return torch.cat([paged.amax(3), paged.amin(3)], dim=-1)
