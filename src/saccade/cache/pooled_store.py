"""Keys and values of every token so far, and beside them the means of the keys in overlapping windows."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache.kv_store import KVStore
from saccade.cache.layer import KVLayer


class PooledStore(KVStore):
    """A KVStore that remembers the window means of its keys. They follow from the keys: where rows are joined or tokens taken back, those
    that are missing are made anew."""

    def __init__(self, layer: KVLayer | None = None) -> None:
        super().__init__(layer)
        self.pooled: Tensor | None = None

    @torch.no_grad()
    def means(self, keys: Tensor, window: int, stride: int) -> Tensor:
        """`(B, Hk, W, D)`: means over tokens `stride w ... stride w + window - 1` of all that is held, keys `(B, Hk, n, D)` without gaps,
        for the W windows that are complete. In float32 at least; always ask with the same window and stride."""
        wide = torch.promote_types(keys.dtype, torch.float32)
        n = keys.shape[2]
        count = 0 if n < window else (n - window) // stride + 1
        held = self.pooled
        if held is None or held.shape[2] > count:
            held = keys.new_zeros(*keys.shape[:2], 0, keys.shape[3], dtype=wide)
        if held.shape[2] < count:
            fresh = keys[:, :, held.shape[2] * stride : (count - 1) * stride + window].to(wide)
            held = torch.cat([held, fresh.unfold(2, window, stride).mean(-1)], dim=2)
        self.pooled = held
        return held

    def reorder(self, rows: Tensor) -> KVStore:
        new = super().reorder(rows)
        assert isinstance(new, PooledStore)
        new.pooled = None if self.pooled is None else self.pooled.index_select(0, rows.to(self.pooled.device))
        return new

    def crop(self, n: int) -> KVStore:
        new = super().crop(n)
        assert isinstance(new, PooledStore)
        # how many windows stay complete is known when the next keys come
        new.pooled = None
        return new

    @property
    def nbytes(self) -> int:
        return super().nbytes + (0 if self.pooled is None else self.pooled.numel() * self.pooled.element_size())

    def _bare(self) -> KVStore:
        return PooledStore(super()._bare().layer)
