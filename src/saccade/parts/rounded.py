"""Tile maxima of logits estimated from few-bit queries and keys, far from the diagonal, as one product per run of tiles.

The same numbers as `saccade.ops.estimate.tile_maxima(bits=...)`, for CPUs: scales, the smoothing terms and what the rows are compared
with become two more columns of the operands, so that what is left is a matrix product and a maximum. Tiles that are read anyway are
not estimated.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.estimate import tile_maxima
from saccade.ops.estimate.reference import estimated
from saccade.ops.scratch import scratch

ROWS, KEYS = 768, 1024  # of one product: its result stays in the cache of a core


def rounded_maxima(
    q: Tensor, k: Tensor, block_q: int, block_k: int, reach: Tensor, *, bits: Literal[4, 8], group: int, relative_to: Tensor,
    scale: float, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """`max over a tile of (estimated logit_ij - relative_to_i)`, float32 (float64) `(B, Hq, Tq, Tk)`, -inf past a row's reach.

    q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`, relative_to `(B, Hq, Nq)`. reach: int64 `(Tq,)` on the CPU, how many first keys each query
    tile asks about: ascending multiples of block_k, none of them beyond the position of the tile's first row.
    bits, group: integers of that many bits with one step for `group` tokens, after smoothing (sale, arXiv 2505.24179, section 3.1).
    """
    if q.is_cuda or softcap is not None:
        return tile_maxima(
            q, k, block_q, block_k, bits=bits, group=group, relative_to=relative_to, reach=reach, scale=scale, softcap=softcap
        )
    found = _products(q, k, block_q, block_k, reach, bits, group, relative_to, scale)
    begin = torch.arange(found.shape[-1], device=q.device) * block_k
    return found.masked_fill_(begin >= reach.unsqueeze(-1), -torch.inf)


def _products(
    q: Tensor, k: Tensor, block_q: int, block_k: int, reach: Tensor, bits: int, group: int, relative_to: Tensor, scale: float
) -> Tensor:
    (batch, heads, n_q, _), (kv_heads, n_k) = q.shape, k.shape[1:3]
    share = heads // kv_heads
    a, b, extra = estimated(q, k, bits, group, True)
    assert extra is not None
    mean = k.mean(2, dtype=b.dtype)
    row = scale * (q.to(b.dtype).unflatten(1, (kv_heads, share)) @ mean[:, :, None, :, None]).flatten(1, 2) - relative_to.unsqueeze(-1)
    left = torch.cat([a * scale, torch.full_like(row, scale), row], dim=-1)
    tiles, columns = reach.shape[0], -(-n_k // block_k)
    left = pad(left, (0, 0, 0, tiles * block_q - n_q)).unflatten(1, (kv_heads, share)).unflatten(3, (tiles, block_q))
    if tiles * block_q > n_q:
        left[:, :, :, -1, n_q % block_q :, -1] = -torch.inf
    left = left.transpose(2, 3)  # (B, Hk, Tq, group, block_q, D + 2)
    # keys of the heads of a group differ by their extra term only, which takes one column each
    right = torch.cat([b, extra.unflatten(1, (kv_heads, share)).transpose(2, 3), torch.ones_like(b[..., :1])], dim=-1).mT.contiguous()
    found = torch.full((batch, heads, tiles, columns), -torch.inf, dtype=b.dtype, device=q.device)
    if not tiles or not int(reach[-1]):
        return found
    left = _own_columns(left, share)
    together = max(1, ROWS // (share * block_q))
    keys = max(1, KEYS // block_k) * block_k
    by_group = found.unflatten(1, (kv_heads, share)).transpose(2, 3)  # (B, Hk, Tq, group, Tk), a view
    for at in range(batch * kv_heads):
        own, other, into = left.flatten(0, 1)[at], right.flatten(0, 1)[at], by_group[at // kv_heads, at % kv_heads]
        for begin in range(0, tiles, together):
            rows = own[begin : begin + together]
            last = int(reach[min(begin + together, tiles) - 1])
            for first in range(0, last, keys):
                end = min(first + keys, last)
                size = (rows.shape[0] * share * block_q, end - first)
                out = torch.mm(rows.flatten(0, 2), other[:, first:end], out=scratch("rounded products", size, b.dtype, q.device))
                top = out.view(rows.shape[0] * share, block_q, -1).amax(1).view(rows.shape[0], share, -1, block_k).amax(-1)
                into[begin : begin + together, :, first // block_k : end // block_k] = top
    return found


def _own_columns(left: Tensor, share: int) -> Tensor:
    """`(..., group, block_q, [a, scale, row])` to `[a, scale in the head's own column of `group`, row]`."""
    own = torch.eye(share, dtype=left.dtype, device=left.device).unsqueeze(1) * left[..., -2:-1]
    return torch.cat([left[..., :-2], own, left[..., -1:]], dim=-1).contiguous()
