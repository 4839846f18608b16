"""The keys that one query reads, as row numbers, and their gathering: a tile is copied as one run of memory."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Selection
from saccade.ops.scratch import as_exact, scratch

BAGGED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that embedding_bag sums with its fast kernels


class Ends(NamedTuple):
    """The greatest last entry of the lists' tile starts and of their single keys, -1 where there are none.

    Lists are sorted and hold n_k past their counts, so an end of n_k says that some list is shorter than others.
    """

    start: int
    token: int

    @classmethod
    def of(cls, s: Selection) -> Ends:
        return cls(*(max(ids[..., -1].flatten().tolist(), default=-1) if ids.shape[-1] else -1 for ids in (s.starts, s.tokens)))


class Listed(NamedTuple):
    """Lists of one query, with every entry inside the cache so that it can be gathered: R of them, of one (batch, list head) each.

    first: of which list of the batch the first one here is. lists: list heads of a batch row. starts `(R, M)`, tokens `(R, M')`;
    weight `(R, M')` or None. gaps: `(R, M * block_k + M')` bool, True for what is gathered but isn't listed, None when all is.
    A tile that would reach past the last key is gathered from block_k keys before the end instead: its keys from before its
    own start are gaps, and all of them for an entry past its list's count.
    """

    first: int
    lists: int
    block_k: int
    starts: Tensor
    tokens: Tensor
    weight: Tensor | None
    gaps: Tensor | None

    @classmethod
    def of(cls, s: Selection, batch: int, lists: int, ends: Ends) -> Listed:
        starts, tokens = _spread(s.starts, batch, lists), _spread(s.tokens, batch, lists)
        weight = None if s.log_weight is None else _spread(s.log_weight, batch, lists)
        if 0 < starts.shape[-1] * s.block_k <= tokens.shape[-1]:
            # a few tiles beside many single keys: single rows are copied in one go, two kinds side by side are not
            tiles = (starts.unsqueeze(-1) + _count(s.block_k, starts.device)).flatten(-2)
            weight = None if weight is None else F.pad(weight, (tiles.shape[-1], 0))
            tokens, starts = torch.cat([tiles, tokens], dim=-1), starts[:, :0]
        gaps, last = None, s.n_k - s.block_k
        if ends.start > last or ends.token >= s.n_k:
            begin, starts = starts.unsqueeze(-1), starts.clamp(max=last)
            before = starts.unsqueeze(-1) + _count(s.block_k, starts.device) < begin
            gaps = torch.cat([before.flatten(-2), tokens >= s.n_k], dim=-1) if tokens.shape[-1] else before.flatten(-2)
            tokens = tokens.clamp(max=s.n_k - 1)
        return cls(0, lists, s.block_k, starts, tokens, weight, gaps)

    def only(self, part: slice) -> Listed:
        """Some of the lists."""
        weight = None if self.weight is None else self.weight[part]
        gaps = None if self.gaps is None else self.gaps[part]
        first = self.first + part.start
        return Listed(first, self.lists, self.block_k, self.starts[part], self.tokens[part], weight, gaps)

    @property
    def singles_from(self) -> int:
        """Where the single keys begin among the gathered ones."""
        return self.starts.shape[-1] * self.block_k

    @property
    def length(self) -> int:
        return self.singles_from + self.tokens.shape[-1]

    def rows(self, x: Tensor, like: Rows | None = None) -> Rows:
        """Where the listed keys of x `(B, Hk, n, D)` lie; `like` is that of another tensor, whose index serves if the strides agree."""
        batch, kv_heads, n, dim = x.shape
        strides = x.stride()
        if strides[3] != 1 or any(stride % dim for stride in strides[:3]) or strides[2] == 0:
            x = x.contiguous()
            strides = x.stride()
        if like is not None and like.shape == x.shape and like.strides == strides:
            return like._replace(flat=x.as_strided(like.flat.shape, (dim, 1)))
        by_batch, by_head, by_key = (stride // dim for stride in strides[:3])
        base = _bases(batch, kv_heads, self.lists // kv_heads, by_batch, by_head, x.device)
        if self.first or base.shape[0] != self.starts.shape[0]:
            base = base[self.first : self.first + self.starts.shape[0]]
        span = (batch - 1) * by_batch + (kv_heads - 1) * by_head + (n - 1) * by_key + 1
        singles = (self.tokens * by_key if by_key != 1 else self.tokens) + base
        return Rows(x.as_strided((span, dim), (dim, 1)), x.shape, strides, base, by_key, singles)

    def gather(self, rows: Rows, exact: torch.dtype) -> Tensor:
        """The listed rows, `(R, M * block_k + M', D)` in dtype `exact`; the next call may reuse the buffer."""
        flat = rows.flat
        split, singles, dim = self.singles_from, self.tokens.shape[-1], flat.shape[1]
        if not split and flat.dtype in BAGGED and not flat.is_cuda:
            return as_exact(copies(flat, rows.singles), exact, "exact rows")
        out = scratch("rows", (self.starts.shape[0], split + singles, dim), flat.dtype, flat.device)
        if split and rows.by_key == 1:
            # a tile is one run of memory: one row of a view in which such a run begins at every key
            width = self.block_k * dim
            runs = flat.as_strided((flat.shape[0] - self.block_k + 1, width), (dim, 1))
            _pick(runs, self.starts + rows.base, out[:, :split] if singles else out)
        elif split:
            ids = (self.starts.unsqueeze(-1) + _count(self.block_k, flat.device)).flatten(-2)
            _pick(flat, ids * rows.by_key + rows.base, out[:, :split] if singles else out)
        if singles:
            _pick(flat, rows.singles, out[:, split:] if split else out)
        return as_exact(out, exact, "exact rows")

    def weighted_sum(self, rows: Rows, weights: Tensor) -> Tensor | None:
        """The sum of the listed rows by weights `(R, M')` float32: `(R, D)`, no row stored. None where only `gather` will do.

        That is, for anything but single keys of a float32 cache in CPU memory.
        """
        if self.singles_from or self.gaps is not None or rows.flat.dtype != torch.float32 or rows.flat.is_cuda:
            return None
        return F.embedding_bag(rows.singles, rows.flat, per_sample_weights=weights, mode="sum")


class Rows(NamedTuple):
    """A cache `(B, Hk, n, D)` as rows `flat (span, D)`: key j of list r is row `base[r] + j * by_key`.

    base `(R, 1)`; singles `(R, M')`, the rows of the single keys.
    """

    flat: Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    base: Tensor
    by_key: int
    singles: Tensor


def copies(rows: Tensor, index: Tensor) -> Tensor:
    """`rows[index]`: bags of one row each, because embedding_bag fetches rows ahead and index_select does not (1.3x at 256 bytes)."""
    bags = F.embedding_bag(index.view(-1), rows, _count(index.numel(), index.device, index.dtype), mode="sum")
    return bags.view(*index.shape, rows.shape[1])


def _pick(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy `rows[index]` to `out (R, n, D)`, a row of `rows` being one or several of those of `out`."""
    if out.is_contiguous():
        torch.index_select(rows, 0, index.view(-1), out=out.view(-1, rows.shape[1]))
    else:  # tiles and single keys stand next to each other in every list
        out.copy_(rows.index_select(0, index.view(-1)).view(out.shape))


def _spread(x: Tensor, batch: int, lists: int) -> Tensor:
    """`(B or 1, H, 1, M)` to `(batch * lists, M)`."""
    if x.shape[0] == batch and x.shape[1] == lists:
        return x.flatten(0, 2)
    if x.shape[1] not in (1, lists):
        x = x.repeat_interleave(lists // x.shape[1], dim=1)
    return x.expand(batch, lists, 1, x.shape[-1]).reshape(batch * lists, x.shape[-1])


@lru_cache(maxsize=64)
def _count(n: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    with torch.inference_mode(False):  # a tensor made in inference mode does not serve outside of it
        return torch.arange(n, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _bases(batch: int, kv_heads: int, group: int, by_batch: int, by_head: int, device: torch.device) -> Tensor:
    """The row of key 0 for each list, `(batch * kv_heads * group, 1)`: int32 where that is enough."""
    rows = [b * by_batch + h * by_head for b in range(batch) for h in range(kv_heads) for _ in range(group)]
    small = max(rows) + max(by_head, by_batch) < 2**31
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32 if small else torch.int64, device=device).unsqueeze(-1)
