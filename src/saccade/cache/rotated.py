"""A sealed segment in orthogonal coordinates: each head keeps the first few of its keys' and of its values' coordinates.

    k' = (k - mu_k) U_k[:, :r_k],   v' = (v - mu_v) U_v[:, :r_v]
    logits = scale (q U_k[:, :r_k] k'^T + q mu_k),   out = P v' U_v[:, :r_v]^T + mu_v

Ranks differ from head to head and storage is real: heads of the same two ranks lie together, nothing is padded. The term q mu_k is the
same for all keys, so no weight inside the segment depends on it, but it decides how much the segment weighs beside other entries.
Source: matryoshkakv, arXiv 2410.14731.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from saccade.cache.segment import Rectangle
from saccade.cache.stores import held, take
from saccade.cache.uniform import UniformSegment
from saccade.core import Partial
from saccade.ops.decode import decode_low_rank
from saccade.parts.rows import pick_rows

FEW = 16  # queries that the decode ops take


@dataclass(frozen=True, kw_only=True)
class Bases:
    """key_basis `(H, D, D)`, value_basis `(H, Dv, Dv)`: orthogonal, columns by decreasing weight; key_mean `(H, D)`, value_mean `(H, Dv)`.

    Made offline: all segments of a layer share them, and they are not counted as a segment's own.
    """

    key_basis: Tensor
    key_mean: Tensor
    value_basis: Tensor
    value_mean: Tensor

    @property
    def nbytes(self) -> int:
        return held(*(getattr(self, f.name) for f in fields(self)))


@dataclass(frozen=True)
class RankGroup:
    """heads `(g,)` int64; coordinates of their keys `(B, g, n, r_k)` and values `(B, g, n, r_v)`."""

    heads: Tensor
    keys: Tensor
    values: Tensor


class RotatedSegment(UniformSegment):
    def __init__(self, groups: Sequence[RankGroup], bases: Bases, positions: Tensor) -> None:
        super().__init__(positions, bases.key_mean.shape[0])
        self.groups, self.bases = tuple(groups), bases

    @classmethod
    def encode(cls, keys: Tensor, values: Tensor, positions: Tensor, bases: Bases, ranks: Sequence[tuple[int, int]]) -> RotatedSegment:
        """keys `(B, H, n, D)`, values `(B, H, n, Dv)`, positions `(B, H, n)`; ranks: of keys and values, for each head."""
        groups = []
        for pair in sorted(set(ranks)):
            heads = torch.tensor([h for h, own in enumerate(ranks) if own == pair], device=keys.device)
            coordinates = [
                _rotated(x[:, heads], basis[heads, :, :rank], mean[heads])
                for x, basis, mean, rank in (
                    (keys, bases.key_basis, bases.key_mean, pair[0]), (values, bases.value_basis, bases.value_mean, pair[1])
                )
            ]  # fmt: skip
            groups.append(RankGroup(heads, *coordinates))
        return cls(groups, bases, positions)

    @property
    def kv_bytes(self) -> int:
        return sum(held(group.keys, group.values) for group in self.groups)

    def read(self, begin: int, end: int) -> Rectangle:
        positions = self.span(begin, end)
        keys, values = self._whole(positions.shape, lambda x, heads: x[:, :, begin:end])
        return Rectangle(keys, values, {"positions": positions})

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        return self._whole(slots.shape, lambda x, heads: pick_rows(x, slots[:, heads]))

    def _whole(self, shape: torch.Size, picked: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values `(B, H, m, ...)` of the coordinates that `picked(coordinates, heads)` takes of each group."""
        kind, b = self.groups[0].keys, self.bases
        keys, values = (kind.new_empty(*shape, mean.shape[-1]) for mean in (b.key_mean, b.value_mean))
        for group in self.groups:
            keys[:, group.heads] = _restored(picked(group.keys, group.heads), b.key_basis, b.key_mean, group.heads)
            values[:, group.heads] = _restored(picked(group.values, group.heads), b.value_basis, b.value_mean, group.heads)
        return keys, values

    def attend(self, q: Tensor, *, scale: float, softcap: float | None) -> Partial:
        # a capped logit does not split into a sum of two
        if q.shape[2] > FEW or softcap is not None:
            return super().attend(q, scale=scale, softcap=softcap)
        share, b = q.shape[1] // self.heads, self.bases
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_empty(*q.shape[:3], b.value_mean.shape[-1])
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        for group in self.groups:
            asking = (group.heads.unsqueeze(-1) * share + torch.arange(share, device=q.device)).flatten()
            mine = q[:, asking]
            found = decode_low_rank(
                mine, group.keys[:, :, : self.n].to(q.dtype), b.key_basis[group.heads, :, : group.keys.shape[-1]].mT.to(q.dtype),
                group.values[:, :, : self.n].to(q.dtype), scale=scale, return_lse=True,
            )  # fmt: skip
            assert found.lse is not None
            common = (mine.to(wide).unflatten(1, (-1, share)) @ b.key_mean[group.heads].to(wide)[:, None, :, None]).flatten(1)
            lse[:, asking] = found.lse.to(wide) + scale * common.view_as(found.lse)
            back = _restored(found.out.unflatten(1, (-1, share)).flatten(2, 3), b.value_basis, b.value_mean, group.heads)
            out[:, asking] = back.reshape(*mine.shape[:3], -1)
        return Partial(out, lse)

    def take_rows(self, rows: Tensor) -> RotatedSegment:
        new = self._picked(rows)
        new.groups = tuple(replace(group, keys=take(group.keys, rows), values=take(group.values, rows)) for group in self.groups)
        return new


def _rotated(x: Tensor, basis: Tensor, mean: Tensor) -> Tensor:
    """x `(B, g, n, D)` in the columns of basis `(g, D, r)`, mean `(g, D)` taken off."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return ((x.to(wide) - mean.to(wide).unsqueeze(1)) @ basis.to(wide)).to(x.dtype)


def _restored(x: Tensor, basis: Tensor, mean: Tensor, heads: Tensor) -> Tensor:
    """The entries `(B, g, n, D)` of coordinates x `(B, g, n, r)` of these heads."""
    wide = torch.promote_types(x.dtype, torch.float32)
    own, middle = basis[heads, :, : x.shape[-1]].to(wide), mean[heads].to(wide)
    return (x.to(wide) @ own.mT + middle.unsqueeze(1)).to(x.dtype)
