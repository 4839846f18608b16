"""What a kernel may be given beyond queries, keys and lists; a part that is None is compiled away.

    bounds     the first and last key of each query row (padding, sequences lying one after another)
    positions  who sees whom in a layout that is not in order
    sinks      a logit for each query head that joins the softmax without a value
    rank       a bias a b^T on the logits, of low rank
"""

# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportArgumentType=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import next_power_of_two


class Extras(NamedTuple):
    """lo, hi `(B or 1, Nq)` int32, contiguous, never falling along Nq; q_positions, k_positions `(B or 1, H or 1, N)` int32;
    sinks `(Hq,)` float32; a, b `(B or 1, Hq or 1, N, R)` in one dtype.
    """

    lo: Tensor | None = None
    hi: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    sinks: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def any(self) -> bool:
        return any(x is not None for x in self)

    @property
    def masks(self) -> bool:
        """Who sees whom is decided here and not by the order of rows."""
        return self.lo is not None or self.q_positions is not None

    def per_query_head(self, kv_heads: int) -> bool:
        """Whether heads of one group may differ in what they see or add to a key."""
        positions, b = self.k_positions, self.b
        return (positions is not None and positions.shape[1] not in (1, kv_heads)) or (b is not None and b.shape[1] != 1)


NONE = Extras()


class Bounds(NamedTuple):
    lo: Any
    hi: Any
    batch: Any


class Positions(NamedTuple):
    """Strides of batch and head, and how many query heads share one head's positions."""

    q: Any
    k: Any
    q_batch: Any
    q_head: Any
    q_share: Any
    k_batch: Any
    k_head: Any
    k_share: Any


class Rank(NamedTuple):
    a: Any
    b: Any
    a_batch: Any
    a_head: Any
    a_row: Any
    b_batch: Any
    b_head: Any
    b_row: Any


def shared(x: Tensor, *dims: int) -> tuple[int, ...]:
    """Strides of x along dims, 0 where it has one entry for all."""
    return tuple(0 if x.shape[i] == 1 else x.stride(i) for i in dims)


def kernel_arguments(extras: Extras, heads: int) -> tuple[Any, ...]:
    """Bounds, positions, sinks and rank as the kernels take them, None each where there are none."""
    lo, hi, q_positions, k_positions, sinks, a, b = extras
    bounds = positions = rank = None
    if lo is not None:
        bounds = Bounds(lo, hi, *shared(lo, 0))
    if q_positions is not None and k_positions is not None:
        q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q_positions, k_positions))
        positions = Positions(q, k, *shared(q, 0, 1), heads // q.shape[1], *shared(k, 0, 1), heads // k.shape[1])
    if a is not None and b is not None:
        a, b = (x if x.stride(3) == 1 else x.contiguous() for x in (a, b))
        rank = Rank(a, b, *shared(a, 0, 1, 2), *shared(b, 0, 1, 2))
    return bounds, positions, sinks, rank


def rank_sizes(extras: Extras, q: Tensor) -> dict[str, Any]:
    """R, the power of two that holds it, and the precision of its products."""
    if extras.a is None:
        return {"R": 1, "BR": 16, "RANK_PRECISION": "ieee"}
    rank = extras.a.shape[3]
    # three products of tf32 are as good as one of float32, and the matrix units can do them
    return {"R": rank, "BR": max(16, next_power_of_two(rank)), "RANK_PRECISION": "ieee" if q.dtype == torch.float32 else "tf32x3"}


@triton.jit
def row_bounds(bounds, batch64, query, rows_ok, n_k):
    """lo and hi of each row, and the smallest and largest of both over rows that exist."""
    at = batch64 * bounds.batch + query
    lo = tl.load(bounds.lo + at, mask=rows_ok, other=0)
    hi = tl.load(bounds.hi + at, mask=rows_ok, other=0)
    return lo, hi, tl.min(tl.where(rows_ok, lo, n_k), 0), tl.max(lo, 0), tl.min(tl.where(rows_ok, hi, n_k), 0), tl.max(hi, 0)


@triton.jit
def query_positions(positions, batch64, head, query, rows_ok):
    at = positions.q + batch64 * positions.q_batch + (head // positions.q_share).to(tl.int64) * positions.q_head + query
    return tl.load(at, mask=rows_ok, other=0)


@triton.jit
def seen_pairs(keys, limit, lo, q_pos, k_pos, n_k):
    """Which keys each row sees, `(rows, keys)`: up to `limit`, from `lo`, and by positions, where these are not None."""
    seen = keys[None, :] <= limit[:, None]
    if lo is not None:
        seen = seen & (keys[None, :] >= lo[:, None])
    if q_pos is not None:
        at = tl.load(k_pos + keys, mask=keys < n_k, other=0)
        seen = seen & (at[None, :] <= q_pos[:, None])
    return seen


@triton.jit
def rank_rows(base, rows, stride, begin, end, R: tl.constexpr, BR: tl.constexpr):
    """Rows of a or b, `(rows, BR)`, 0 outside begin ... end - 1."""
    cols = tl.arange(0, BR)
    ok = ((rows >= begin) & (rows < end))[:, None] & (cols < R)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=ok, other=0.0)
