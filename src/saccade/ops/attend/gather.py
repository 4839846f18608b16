"""Rows of keys and values picked by id, without copying what is not picked."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.scratch import scratch


class KeyRows:
    """K and V seen as flat rows, so that one `index_select` fetches the listed keys of many heads.

    Works on views into larger buffers (a growing cache, a transposed projection) without making them contiguous.
    `heads` lists are gathered, list head h from key/value head `h // group`. reuse: what is gathered lies in buffers
    that the next call overwrites, so nothing (autograd for one) may hold on to it.
    """

    def __init__(self, k: Tensor, v: Tensor, *, heads: int, group: int, reuse: bool = False) -> None:
        self.n_k = k.shape[2]
        self.reuse = reuse
        self.k, self.v = k, v
        self.kv_head = torch.arange(heads, device=k.device) // group
        self.sources = [_flat_rows(x, self.kv_head) for x in (k, v)]
        self._tiled: dict[int, list[Tensor]] = {}

    def gather(self, ids: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """K and V rows for ids `(P, n)` (ids >= n_k give some row) of (batch, list head) pairs `(P,)`: `(P, n, D)`, `(P, n, Dv)`."""
        ids = ids.clamp(max=self.n_k - 1)
        picked = []
        for name, (flat, base, step) in zip(("gathered keys", "gathered values"), self.sources, strict=True):
            index = (ids * step + base[pairs].unsqueeze(-1)).flatten()
            shape = (*ids.shape, flat.shape[-1])
            if self.reuse:
                rows = scratch(name, shape, flat.dtype, flat.device)
                torch.index_select(flat, 0, index, out=rows.view(-1, shape[-1]))
                picked.append(rows)
            else:
                picked.append(flat.index_select(0, index).view(shape))
        return picked[0], picked[1]

    def gather_tiles(self, starts: Tensor, pairs: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """K and V rows of whole tiles, `block` neighbouring keys copied at a time: `(P, M * block, D)`, `(P, M * block, Dv)`.

        starts `(P, M)`: multiples of `block`.
        """
        if block not in self._tiled:
            filled = (torch.nn.functional.pad(x, (0, 0, 0, -self.n_k % block)) for x in (self.k, self.v))
            self._tiled[block] = [x.contiguous().view(-1, block * x.shape[-1]) for x in filled]
        tiles, heads = -(-self.n_k // block), self.kv_head.shape[0]
        first = (torch.div(pairs, heads, rounding_mode="floor") * self.k.shape[1] + self.kv_head[pairs % heads]) * tiles
        index = (torch.div(starts, block, rounding_mode="floor") + first.unsqueeze(-1)).flatten()
        picked = []
        for name, flat, x in zip(("gathered keys", "gathered values"), self._tiled[block], (self.k, self.v), strict=True):
            shape = (starts.shape[0], starts.shape[1] * block, x.shape[-1])
            if self.reuse:
                rows = scratch(name, shape, flat.dtype, flat.device)
                torch.index_select(flat, 0, index, out=rows.view(-1, flat.shape[-1]))
                picked.append(rows)
            else:
                picked.append(flat.index_select(0, index).view(shape))
        return picked[0], picked[1]


def _flat_rows(x: Tensor, head: Tensor) -> tuple[Tensor, Tensor, int]:
    """`(rows (R, D), first row of each (batch, list head) pair int64, rows between neighbouring keys)` for x `(B, Hk, N, D)`."""
    batch, _, _, dim = x.shape
    strides = x.stride()
    if strides[3] != 1 or any(stride % dim for stride in strides[:3]) or strides[2] == 0:
        x = x.contiguous()
        strides = x.stride()
    span = sum((size - 1) * stride for size, stride in zip(x.shape[:3], strides[:3], strict=True)) // dim + 1
    flat = x.as_strided((span, dim), (dim, 1), x.storage_offset())
    base = torch.arange(batch, device=x.device)[:, None] * (strides[0] // dim) + head * (strides[1] // dim)
    return flat, base.flatten(), strides[2] // dim
