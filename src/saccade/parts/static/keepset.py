"""Which cache entries a static pattern can still need, and dropping the others from a cache layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import LayerContext, StoredKV
from saccade.core.tilemath import list_true
from saccade.parts.static.pattern import Pattern

PLACE = "place"  # the side array: where in its sequence an entry stands, padding not counted


@dataclass(frozen=True)
class CachePlan:
    """The keep-set of a pattern: after position t, the keys that some later query may read.

    heads: stored heads (a multiple of them may be told apart by the pattern: a group keeps what any of its heads needs). A pattern
    whose `evictable` is False is never done with a key that it may still read; what the plan drops is never read in any case.
    """

    pattern: Pattern
    heads: int

    @property
    def evictable(self) -> bool:
        """Whether a key out of view is out of view for good, so that the cache holds no more than what is in view."""
        return self.pattern.evictable

    def keep(self, places: Tensor, t: int) -> Tensor:
        """Of keys at `places (B, heads, n)` (all <= t), which must stay once the query at t has been served: bool, same shape."""
        of_heads = places.movedim(1, 0)
        told = self.pattern.heads
        if told > self.heads:
            if told % self.heads:
                raise ValueError(f"a pattern of {told} heads does not fit {self.heads} stored heads: give a multiple of them, or 1")
            of_heads = of_heads.repeat_interleave(told // self.heads, dim=0)
        elif told not in (1, self.heads):
            raise ValueError(f"a pattern of {told} heads does not fit {self.heads} stored heads: give a multiple of them, or 1")
        needed = self.pattern.needed(of_heads.long(), t)
        if told > self.heads:
            needed = needed.unflatten(0, (self.heads, -1)).any(1)
        return needed.movedim(0, 1)

    def size(self, t: int) -> Tensor:
        """Keys of each head that stay after position t, int64 `(heads,)`."""
        places = torch.arange(t + 1).expand(1, self.heads, -1)
        return self.keep(places, t)[0].sum(-1)


def note_places(ctx: LayerContext, kv: StoredKV, m: int) -> None:
    """Write down where the m newest entries stand. To be called by `observe`."""
    positions = kv.side["positions"]
    places = kv.side.get(PLACE)
    places = torch.zeros_like(positions) if places is None else places.clone()
    if kv.valid is None:
        places[..., kv.length - m :] = torch.arange(ctx.seen - m, ctx.seen, device=places.device)
    else:
        # heads hold different numbers: a head's newest entries stand at the end of its own
        held = kv.valid.sum(-1, keepdim=True)
        back = held - 1 - torch.arange(kv.length, device=places.device)
        fresh = (back >= 0) & (back < m)
        places = torch.where(fresh, (ctx.seen - 1 - back).to(places.dtype), places)
    kv.side[PLACE] = places


def drop_unneeded(ctx: LayerContext, kv: StoredKV, pattern: Pattern) -> None:
    """Drop the entries that no later query reads under `pattern`."""
    places = kv.side[PLACE]
    keep = CachePlan(pattern, kv.heads).keep(places, ctx.seen - 1)
    if kv.valid is not None:
        keep = keep & kv.valid
    if bool(keep.all()):
        return
    slots, counts = list_true(keep)
    kv.keep(slots.long().clamp(max=kv.length - 1), counts)
