"""A KVLayer as part of a mixer's state: keys and values of every token so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.cache.layer import KVLayer
from saccade.cache.segment import Rectangle
from saccade.cache.tail import Tail


class KVStore:
    """Holds one KVLayer, which `append` changes in place. A store of `saccade.core.MixerState`."""

    def __init__(self, layer: KVLayer | None = None) -> None:
        self.layer = KVLayer() if layer is None else layer

    def append(self, k: Tensor, v: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add k, v `(B, Hk, m, ...)`, of which real `(B, m)` bool are tokens (None: all); all that is held and which of it are tokens.

        With gradients the tensors are made anew, as autograd may not see them change.
        """
        if k.requires_grad and torch.is_grad_enabled() and self.layer.tail is not None:
            held = self.layer.tail
            copies = {name: x.clone() for name, x in held.side.items()}
            self.layer.tail = Tail(Rectangle(held.keys.clone(), held.values.clone(), copies), held.real)
        self.layer.expect(real)
        self.layer.update(k, v)
        tail = self.layer.tail
        assert tail is not None
        return tail.keys, tail.values, tail.real

    def reorder(self, rows: Tensor) -> KVStore:
        new = self._bare()
        if self.layer.tail is not None:
            new.layer.tail = self.layer.tail.take_rows(rows)
        return new

    def copy(self) -> KVStore:
        if self.layer.tail is None:
            return self._bare()
        return self.reorder(torch.arange(self.layer.tail.keys.shape[0]))

    def crop(self, n: int) -> KVStore:
        """Without the last n tokens. ValueError where padding stands among them."""
        new = self.copy()
        real = None if new.layer.tail is None else new.layer.tail.real
        if real is not None and not bool(real[:, -n:].all()):
            raise ValueError(f"the last {n} tokens of some rows are padding: take tokens back from rows without padding at their end")
        new.layer.crop(-n)
        return new

    @staticmethod
    def joined(stores: Sequence[KVStore]) -> KVStore:
        """One store of the rows of several; shorter ones are filled up with padding at the end."""
        tails = [store.layer.tail for store in stores if store.layer.tail is not None]
        if len(tails) != len(stores):
            raise ValueError("an empty store can't be joined with others: give each row a token first")
        n = max(tail.n for tail in tails)

        def filled(x: Tensor, short: int) -> Tensor:
            """`(B, H, n - short, ...)` or `(B, n - short)` with zeros up to n tokens."""
            return pad(x, (0, 0) * (x.ndim - 3) + (0, short))

        shorts = [n - tail.n for tail in tails]
        keys, values, positions = (
            torch.cat([filled(x, short) for x, short in zip(parts, shorts, strict=True)])
            for parts in zip(*((tail.keys, tail.values, tail.side["positions"]) for tail in tails), strict=True)
        )
        real = torch.cat([
            filled(torch.ones_like(tail.side["positions"][:, 0], dtype=torch.bool) if tail.real is None else tail.real, short)
            for tail, short in zip(tails, shorts, strict=True)
        ])  # fmt: skip
        new = stores[0]._bare()
        new.layer.tail = Tail(Rectangle(keys, values, {"positions": positions}), None if bool(real.all()) else real)
        new.layer.seen = max(store.layer.seen for store in stores)
        return new

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room included."""
        return self.layer.kv_bytes + self.layer.side_bytes

    def _bare(self) -> KVStore:
        new = KVLayer()
        old = self.layer
        if old.segments:
            raise ValueError("a cache that a policy has compressed can't be copied out of its layer: use the layer itself")
        new.seen, new.is_initialized = old.seen, old.is_initialized
        if old.is_initialized:
            new.dtype, new.device = old.dtype, old.device
        return KVStore(new)
