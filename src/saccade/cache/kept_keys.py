"""Keys and values of chosen tokens as part of a mixer's state: every row and head keeps its own number of them, and room for no more.

What one (row, head) pair keeps lies together, oldest first, the pairs one after another: `keys (total, D)` with `counts (B, H)`. Nothing
changes in place: each operation gives a new store, so gradients pass through and an old store stays good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Partial, Selection, merge
from saccade.ops import attend, decode


class KeptRectangle(NamedTuple):
    """keys `(B, H, n, D)`, values `(B, H, n, Dv)`, side arrays and valid `(B, H, n)`: False behind the entries of a pair."""

    keys: Tensor
    values: Tensor
    side: dict[str, Tensor]
    valid: Tensor


class KeptKeys:
    """keys `(total, D)`, values `(total, Dv)`, side arrays `(total,)` by name, counts `(B, H)` int64 that sum to total.

    A side array "log_weight" is added to the logits of its keys. A store of `saccade.core.MixerState`.
    """

    def __init__(self, keys: Tensor, values: Tensor, side: dict[str, Tensor], counts: Tensor) -> None:
        self.keys, self.values, self.side, self.counts = keys, values, side, counts

    @classmethod
    def none(cls, k: Tensor, v: Tensor) -> KeptKeys:
        """A store without entries for keys like k `(B, H, n, D)` and values like v `(B, H, n, Dv)`."""
        counts = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
        return cls(k.new_zeros(0, k.shape[3]), v.new_zeros(0, v.shape[3]), {}, counts)

    @property
    def batch(self) -> int:
        return self.counts.shape[0]

    @property
    def heads(self) -> int:
        return self.counts.shape[1]

    @property
    def offsets(self) -> Tensor:
        """Where each pair begins, and the total: `(B * H + 1,)` int64."""
        ends = self.counts.flatten().cumsum(0)
        return torch.cat([ends.new_zeros(1), ends])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind everything that is kept."""
        held = (self.keys, self.values, self.counts, *self.side.values())
        return sum(x.untyped_storage().nbytes() for x in held)

    # -- what is kept ------------------------------------------------------------------------------------------------------

    def add(self, k: Tensor, v: Tensor, chosen: Tensor, **side: Tensor) -> KeptKeys:
        """With the entries of k `(B, H, m, D)`, v `(B, H, m, Dv)` and side arrays `(B, H, m)` where chosen `(B, H, m)` is True.

        They come behind those of their pair. A side array that only the old or only the new entries have is 0 for the others.
        """
        if not bool(chosen.any()):
            return self
        new = chosen.sum(-1)
        order = torch.argsort(torch.cat([_pairs(self.counts), _pairs(new)]), stable=True)
        total = int(new.sum())

        def joined(old: Tensor | None, x: Tensor | None) -> Tensor:
            if x is None or old is None:
                known = old if x is None else x
                assert known is not None
                x = known.new_zeros(total) if x is None else x[chosen]
                old = known.new_zeros(self.keys.shape[0]) if old is None else old
            else:
                x = x[chosen]
            return torch.cat([old, x.to(old.dtype)]).index_select(0, order)

        names = [*self.side, *(name for name in side if name not in self.side)]
        arrays = {name: joined(self.side.get(name), side.get(name)) for name in names}
        return KeptKeys(joined(self.keys, k), joined(self.values, v), arrays, self.counts + new)

    def best(self, name: str, most: int) -> KeptKeys:
        """At most `most` entries of each pair: those with the largest numbers in that side array, the older ones of equal ones."""
        if int(self.counts.max()) <= most:
            return self
        rectangle = self.rectangle()
        scores = rectangle.side[name].masked_fill(~rectangle.valid, -torch.inf)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        places = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
        stay = (places < most)[rectangle.valid]
        arrays = {key: x[stay] for key, x in self.side.items()}
        return KeptKeys(self.keys[stay], self.values[stay], arrays, self.counts.clamp(max=most))

    def without(self, name: str) -> KeptKeys:
        """Without that side array."""
        return KeptKeys(self.keys, self.values, {key: x for key, x in self.side.items() if key != name}, self.counts)

    def rectangle(self) -> KeptRectangle:
        """Everything as rectangles as long as the longest pair; gaps hold entries of other pairs, or zeros where there is none."""
        n = int(self.counts.max())
        slots = torch.arange(n, device=self.counts.device)
        begins = self.offsets[:-1].view(self.batch, self.heads, 1)
        index = (begins + slots).clamp(max=max(self.keys.shape[0] - 1, 0)).flatten()

        def laid(x: Tensor) -> Tensor:
            return x.index_select(0, index).view(self.batch, self.heads, n, *x.shape[1:])

        side = {name: laid(x) for name, x in self.side.items()}
        return KeptRectangle(laid(self.keys), laid(self.values), side, slots < self.counts.unsqueeze(-1))

    # -- reading -----------------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, *, seen: Tensor | None = None, tile: int | None = None, state: Partial | None = None) -> Partial:
        """Attention of q `(B, Hq, N, D)` over what is kept, Hq a multiple of H, with its log-sum-exp.

        seen: `(B, H, N)`, how many entries of its pair a query sees, the first ones; None: all. tile: the queries come in tiles of so many
        (the last may be shorter), `seen` is `(B, H, tiles)` and all its numbers and all counts are multiples of it, as where tokens are
        kept by chunks. state: an earlier result over other keys; the result is over both.
        """
        n, group = q.shape[2], q.shape[1] // self.heads
        if not self.keys.shape[0]:
            nothing = Partial(q.new_zeros(*q.shape[:3], self.values.shape[1]), q.new_full(q.shape[:3], -torch.inf, dtype=_wide(q)))
            return nothing if state is None else state
        gradients = torch.is_grad_enabled() and (q.requires_grad or self.keys.requires_grad or self.values.requires_grad)
        if n == 1 and seen is None and not gradients and "log_weight" not in self.side:
            mine = decode(q, self.keys, self.values, offsets=self.offsets, kv_heads=self.heads, return_lse=True)
            return mine if state is None else merge(mine, state)
        held = self.rectangle()
        bias = None
        if "log_weight" in held.side:
            weights = held.side["log_weight"].repeat_interleave(group, dim=1).unsqueeze(-1)
            bias = (weights.new_ones(1, 1, n, 1), weights)
        if tile is not None and seen is not None:
            lists = _prefixes(seen, tile, n, held.keys.shape[2])
            return attend(q, held.keys, held.values, lists, return_lse=True, low_rank_bias=bias, state=state)
        last = (self.counts.unsqueeze(-1) if seen is None else seen).expand(-1, -1, n) - 1
        slots = torch.arange(held.keys.shape[2], device=q.device)[None, None]
        return attend(
            q, held.keys, held.values, causal=True, q_positions=last.to(torch.int32), k_positions=slots.to(torch.int32),
            return_lse=True, low_rank_bias=bias, state=state,
        )  # fmt: skip

    # -- as part of a state ------------------------------------------------------------------------------------------------

    def reorder(self, rows: Tensor) -> KeptKeys:
        rows = rows.to(self.counts.device)
        counts = self.counts.index_select(0, rows)
        sizes = counts.flatten()
        first = self.offsets[:-1].view_as(self.counts).index_select(0, rows).flatten()
        # from where an entry comes: its pair's first, and its place in the pair
        index = torch.repeat_interleave(first - (sizes.cumsum(0) - sizes), sizes)
        index = index + torch.arange(index.shape[0], device=index.device)
        side = {name: x.index_select(0, index) for name, x in self.side.items()}
        return KeptKeys(self.keys.index_select(0, index), self.values.index_select(0, index), side, counts)

    def copy(self) -> KeptKeys:
        """Nothing changes in place, so one store serves several states."""
        return self

    def crop(self, n: int) -> KeptKeys:
        """ValueError: the tokens that were not kept are gone, so what was kept before the last n can't be told."""
        raise ValueError(f"a store of chosen tokens can't be taken back by {n} tokens: keep a copy() of the state before them")

    @staticmethod
    def joined(stores: Sequence[KeptKeys]) -> KeptKeys:
        """One store of the rows of several, in order; a side array that some lack is 0 there."""
        known = {name: x for store in stores for name, x in store.side.items()}
        side = {
            name: torch.cat([store.side.get(name, like.new_zeros(store.keys.shape[0])) for store in stores]) for name, like in known.items()
        }
        keys, values, counts = (torch.cat([getattr(store, name) for store in stores]) for name in ("keys", "values", "counts"))
        return KeptKeys(keys, values, side, counts)


def _pairs(counts: Tensor) -> Tensor:
    """The pair of every entry."""
    sizes = counts.flatten()
    return torch.repeat_interleave(torch.arange(sizes.shape[0], device=sizes.device), sizes)


def _prefixes(seen: Tensor, tile: int, n_q: int, n_k: int) -> Selection:
    """The first `seen (B, H, tiles)` of n_k keys for each tile of queries, in tiles."""
    starts = torch.arange(0, n_k, tile, dtype=torch.int32, device=seen.device)
    counts = (seen // tile).to(torch.int32)
    listed = starts.expand(*seen.shape, -1).masked_fill(starts >= seen.unsqueeze(-1), n_k)
    return Selection(
        n_q=n_q, n_k=n_k, block_q=tile, block_k=tile, starts=listed, start_counts=counts, tokens=listed[..., :0],
        token_counts=torch.zeros_like(counts), causal=False,
    )  # fmt: skip


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
