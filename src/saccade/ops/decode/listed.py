"""The keys that one query reads, as row numbers, and their gathering: a tile is copied as one run of memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.ops.decode.scratch import as_exact, scratch


class Ends(NamedTuple):
    """The greatest last entry of the lists' tile starts and of their single keys, -1 where there are none.

    Lists are sorted and hold n_k past their counts, so an end of n_k says that some list is shorter than others.
    """

    start: int
    token: int

    @classmethod
    def of(cls, s: Selection) -> Ends:
        return cls(*(int(ids[..., -1].max()) if ids.shape[-1] else -1 for ids in (s.starts, s.tokens)))


class Listed(NamedTuple):
    """Lists of one query, R = batch * lists of them, with every entry inside the cache so that it can be gathered.

    starts `(R, M)`, tokens `(R, M')`; weight `(R, M')` or None. gaps: `(R, M * block_k + M')` bool, True for what is gathered
    but isn't listed, None when all is. A tile that would reach past the last key is gathered from block_k keys before the end
    instead: its keys from before its own start are gaps, and all of them for an entry past its list's count.
    """

    batch: int
    block_k: int
    starts: Tensor
    tokens: Tensor
    weight: Tensor | None
    gaps: Tensor | None

    @classmethod
    def of(cls, s: Selection, batch: int, lists: int, ends: Ends) -> Listed:
        starts, tokens = _spread(s.starts, batch, lists), _spread(s.tokens, batch, lists)
        weight = None if s.log_weight is None else _spread(s.log_weight, batch, lists)
        gaps, last = None, s.n_k - s.block_k
        if ends.start > last or ends.token >= s.n_k:
            first, starts = starts.unsqueeze(-1), starts.clamp(max=last)
            before = starts.unsqueeze(-1) + _count(s.block_k, starts.device) < first
            gaps = torch.cat([before.flatten(-2), tokens >= s.n_k], dim=-1) if tokens.shape[-1] else before.flatten(-2)
            tokens = tokens.clamp(max=s.n_k - 1)
        return cls(batch, s.block_k, starts, tokens, weight, gaps)

    @property
    def singles_from(self) -> int:
        """Where the single keys begin among the gathered ones."""
        return self.starts.shape[-1] * self.block_k

    @property
    def length(self) -> int:
        return self.singles_from + self.tokens.shape[-1]

    def rows_of(self, x: Tensor, group: int) -> Rows:
        """Where the listed keys of x `(B, Hk, n, D)` lie; lists h * group ... belong to head h."""
        dim, strides = x.shape[-1], x.stride()
        if strides[3] != 1 or any(stride % dim for stride in strides[:3]) or strides[2] == 0:
            x = x.contiguous()
            strides = x.stride()
        by_batch, by_head, by_key = (stride // dim for stride in strides[:3])
        base = _bases(self.batch, x.shape[1], group, by_batch, by_head, x.device)
        starts, tokens, run = self.starts, self.tokens, self.block_k
        if by_key != 1:
            # neighbouring keys are not neighbours in memory: every key of a tile is a run of its own
            starts, run = (starts.unsqueeze(-1) + _count(run, x.device)).flatten(-2) * by_key, 1
            tokens = tokens * by_key
        return Rows(x, run, self.singles_from, starts + base, tokens + base if tokens.shape[-1] else tokens)


class Rows(NamedTuple):
    """x `(B, Hk, n, D)`, rows of D channels in memory; runs `(R, M)` and single rows `(R, M')` to gather, of `run` rows each and 1."""

    x: Tensor
    run: int
    singles_from: int
    starts: Tensor
    singles: Tensor

    def fits(self, other: Tensor) -> bool:
        """Whether the same row numbers are right for another tensor."""
        return self.x.shape == other.shape and self.x.stride() == other.stride()

    def like(self, other: Tensor) -> Rows:
        return self._replace(x=other)

    def gather(self, part: slice, exact: torch.dtype) -> Tensor:
        """The rows of some lists, `(lists of the part, M * run + M', D)` in dtype `exact`, in a buffer that the next call reuses."""
        starts, singles, dim = self.starts[part], self.singles[part], self.x.shape[-1]
        out = scratch("rows", (starts.shape[0], self.singles_from + singles.shape[-1], dim), self.x.dtype, self.x.device)
        if self.singles_from:
            self._pick(starts, out[:, : self.singles_from], self.run)
        if singles.shape[-1]:
            self._pick(singles, out[:, self.singles_from :], 1)
        return as_exact(out, exact, "exact rows")

    def _pick(self, index: Tensor, out: Tensor, run: int) -> None:
        """Copy the runs of `run` rows that begin at rows `index (lists, m)` to `out (lists, m * run, D)`."""
        dim = self.x.shape[-1]
        span = sum((size - 1) * stride for size, stride in zip(self.x.shape[:3], self.x.stride()[:3], strict=True)) // dim + 1
        runs = self.x.as_strided((span - run + 1, run * dim), (dim, 1))  # a run begins at every row
        if out.is_contiguous():
            torch.index_select(runs, 0, index.flatten(), out=out.view(-1, run * dim))
        else:  # tiles and single keys stand next to each other in every list
            out.copy_(runs.index_select(0, index.flatten()).view(out.shape))


def _spread(x: Tensor, batch: int, lists: int) -> Tensor:
    """`(B or 1, H, 1, M)` to `(batch * lists, M)`."""
    if x.shape[1] not in (1, lists):
        x = x.repeat_interleave(lists // x.shape[1], dim=1)
    return x.expand(batch, lists, 1, x.shape[-1]).reshape(batch * lists, x.shape[-1])


@lru_cache(maxsize=64)
def _count(n: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode does not serve outside of it
        return torch.arange(n, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _bases(batch: int, kv_heads: int, group: int, by_batch: int, by_head: int, device: torch.device) -> Tensor:
    """The row of key 0 for each list, `(batch * kv_heads * group, 1)`: int32 where that is enough."""
    rows = [b * by_batch + h * by_head for b in range(batch) for h in range(kv_heads) for _ in range(group)]
    small = max(rows) + max(by_head, by_batch) < 2**31
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32 if small else torch.int64, device=device).unsqueeze(-1)
