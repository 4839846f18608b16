"""What a decode method reads of a layer whose older entries lie encoded: the chosen ones are decoded, and no others.

Slots are counted through the sealed segments, oldest first, and on through the plain entries after them. A step over the keys S that were
chosen of all slots gathers their codes, decodes these few, and attends once:

    out = softmax_{j in S}(scale q.k_j) v_j,   k_j, v_j restored from segment or tail

so that no copy of the cache in full precision ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from saccade.cache.counted import CountedSegment
from saccade.cache.segment import CHUNK, Segment, attend_rectangle
from saccade.core import Partial, Selection, merge
from saccade.ops import attend
from saccade.ops.record import last_run, note
from saccade.parts.dots import dots, weighted_values
from saccade.parts.rows import pick_rows


def ragged_rows(segments: Sequence[Segment]) -> bool:
    """Whether some segment of all batch rows holds more entries of one row than of another."""
    return any(len({tuple(row) for row in segment.lengths()}) > 1 for segment in segments if segment.row is None)


@dataclass(frozen=True)
class MixedEntries:
    """Encoded segments of the same batch rows, and plain entries k `(B, H, t, D)`, v `(B, H, t, Dv)` after them. Implements
    `saccade.core.EncodedEntries`. ValueError where heads hold different numbers of entries, or an entry stands for several tokens.
    """

    segments: tuple[Segment, ...]
    k: Tensor
    v: Tensor

    def __post_init__(self) -> None:
        if any(isinstance(segment, CountedSegment) for segment in self.segments):
            raise ValueError("some entries of this cache stand for several tokens: a decode method would read each as one")
        if any(len({n for row in segment.lengths() for n in row}) > 1 for segment in self.segments):
            raise ValueError(
                "heads hold different numbers of encoded entries since tokens were taken back: a decode method needs equally many, "
                "so run the prompt again"
            )

    @cached_property
    def ends(self) -> list[int]:
        """Where each segment ends."""
        return torch.tensor([segment.length for segment in self.segments]).cumsum(0).tolist()

    @property
    def sealed(self) -> int:
        """Encoded entries."""
        return self.ends[-1] if self.segments else 0

    @property
    def n(self) -> int:
        """Entries in all."""
        return self.sealed + self.k.shape[2]

    @cached_property
    def shapes(self) -> tuple[Tensor, Tensor]:
        """Keys `(B, H, n, D)` and values `(B, H, n, Dv)` that tell shape, dtype and device, and hold nothing: every number is nan."""
        blank = self.k.new_full((1, 1, 1, 1), torch.nan)
        keys, values = (blank.expand(*x.shape[:2], self.n, x.shape[3]) for x in (self.k, self.v))
        return keys, values

    def pieces(self, start: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Slots from `start` on, CHUNK at a time: the first slot, keys and values."""
        for segment, end in zip(self.segments, self.ends, strict=True):
            begin = end - segment.length
            for at in range(max(start, begin), end, CHUNK):
                part = segment.read(at - begin, min(at - begin + CHUNK, segment.length))
                yield at, part.keys, part.values
        skipped = max(0, start - self.sealed)
        if skipped < self.k.shape[2]:
            yield self.sealed + skipped, self.k[:, :, skipped:], self.v[:, :, skipped:]

    def dots(self, q: Tensor) -> Tensor:
        """q `(B, Hq, D)` times all keys: `(B, Hq, n)` float32 (float64 for float64). Every key is decoded, CHUNK at a time."""
        return torch.cat([dots(q, keys) for _, keys, _ in self.pieces()], dim=-1)

    def weighted_values(self, weights: Tensor) -> Tensor:
        """weights `(B, Hq, n)` times all values: `(B, Hq, Dv)`. Every value is decoded, CHUNK at a time."""
        found = [weighted_values(weights[..., at : at + values.shape[2]], values) for at, _, values in self.pieces()]
        return torch.stack(found).sum(0)

    def attend(self, q: Tensor, selection: Selection | None, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, 1, D)` over the slots that the selection lists (None: all), with log-sum-exp."""
        if selection is None or _lists_all(selection):
            parts = [segment.attend(q, scale=scale, softcap=softcap) for segment in self.segments]
            if self.k.shape[2]:
                parts.append(attend_rectangle(q, self.k, self.v, scale=scale, softcap=softcap))
            return merge(*parts)
        heads = self.k.shape[1]
        lists = heads if heads % selection.heads == 0 else q.shape[1]
        ids, weight = _listed(selection.expand(q.shape[0], lists))
        keys, values = self._gather(ids)
        gaps = ids >= self.n
        if weight is None and not bool(gaps.any()):
            found = attend_rectangle(q, keys, values, scale=scale, softcap=softcap)
        else:
            bias = torch.zeros(ids.shape, device=q.device) if weight is None else weight
            bias = bias.masked_fill(gaps, -torch.inf).repeat_interleave(q.shape[1] // lists, 1).unsqueeze(2)
            found = attend(q, keys, values, causal=False, scale=scale, softcap=softcap, bias=bias, return_lse=True)
        # the op saw the gathered entries: what was read is the selection
        note(replace(last_run(), op="decode", n_k=self.n, selection=selection))
        return found

    def _gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(B, L, m, D)` and values of slots `ids (B, L, m)`, ascending, L a multiple of H; zeros for slots past the end."""
        (batch, lists, m), heads = ids.shape, self.k.shape[1]
        keys, values = (x.new_zeros(batch, lists, m, x.shape[3]) for x in (self.k, self.v))
        ends = [*self.ends, self.n]
        # the lists ascend, so what they read of a segment stands in a row; the columns where some list does
        edges = torch.searchsorted(ids.contiguous(), torch.tensor([0, *ends], device=ids.device).expand(batch, lists, -1).contiguous())
        first, last = edges.amin((0, 1)).tolist(), edges.amax((0, 1)).tolist()
        for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            low, high = first[number], last[number + 1]
            if begin == end or low == high:
                continue
            own = ids[..., low:high]
            mine = ((own >= begin) & (own < end)).unsqueeze(-1)
            # the lists of a group read the same head, one after the other
            slots = (own - begin).clamp(0, end - begin - 1).reshape(batch, heads, -1)
            if number < len(self.segments):
                found = self.segments[number].gather(slots)
            else:
                found = pick_rows(self.k, slots), pick_rows(self.v, slots)
            for whole, part in zip((keys, values), found, strict=True):
                here = whole[:, :, low:high]
                here.copy_(torch.where(mine, part.reshape(here.shape), here))
        return keys, values


def _lists_all(s: Selection) -> bool:
    """Whether every list names every key, told from their lengths; tiles that stand anywhere may reach past the end, so those never do."""
    return s.log_weight is None and s.aligned and bool((s.start_counts * s.block_k + s.token_counts >= s.n_k).all())


def _listed(s: Selection) -> tuple[Tensor, Tensor | None]:
    """The keys that one query's lists name, int64 `(B, L, m)` ascending, n_k where a list is shorter; and what is added to their logits."""
    starts, tokens = s.starts[:, :, 0].long(), s.tokens[:, :, 0].long()
    tiles = starts.unsqueeze(-1) + torch.arange(s.block_k, device=starts.device)
    tiles = tiles.masked_fill((starts >= s.n_k).unsqueeze(-1), s.n_k).flatten(2).clamp(max=s.n_k)
    ids, order = torch.cat([tiles, tokens.clamp(max=s.n_k)], dim=-1).sort(dim=-1, stable=True)
    if s.log_weight is None:
        return ids, None
    weight = torch.nn.functional.pad(s.log_weight[:, :, 0], (tiles.shape[-1], 0))
    return ids, weight.gather(-1, order)
