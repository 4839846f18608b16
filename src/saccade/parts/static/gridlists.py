"""Neighbourhoods as a Selection: the order of the tokens, the lists of each query tile, and the exact mask inside tiles.

Queries are ordered so that each n-d tile of them is one run of rows; a tile reads the box that covers the windows of its rows. Keys
are read one by one where they lie, or, ordered in the same way, in n-d tiles. Where the rows of a tile have different windows along
an axis (a stride below the tile) or a key tile crosses a window's border, what a row may not read is masked exactly: every key
carries a one-hot vector of its coordinate modulo P on that axis, every row minus infinity (a number near it) at the coordinates
that are not its own, so that q.k, the executor's only product, comes out as the logit or far below every logit. P is no more than
the extent of a tile's box, so this costs about as many channels as a box is wide, and no mask of queries by keys exists anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.static.neighborhood import Neighborhood


@dataclass(frozen=True, eq=False)
class GridLists:
    """rows `(Nq',)`: the token that each row of the tiled order takes (a tile at the border is filled up with tokens whose result
    is dropped); places `(N,)`: the row of each token. keys: the token of each key slot, None: keys stay as they are.
    row_bits `(Nq', R)`, key_bits `(Nk', R)` bool: a row may not read a key that shares a set bit with it; None: nothing to mask.
    twice: the keys stand a second time behind the first; only the second copies carry bits. extra: keys at the end that all rows read.
    """

    rows: Tensor
    places: Tensor
    keys: Tensor | None
    row_bits: Tensor | None
    key_bits: Tensor | None
    twice: bool
    extra: int
    selection: Selection


@dataclass(frozen=True)
class _Axis:
    """One axis of a dilation group of `length`, in query tiles of `tile` and key units of `unit` coordinates.

    units `(T, U)`: the units a query tile reads, -1 past the end; inner `(T, U)`: all rows read all of the unit.
    """

    length: int
    tile: int
    unit: int
    start: Tensor
    end: Tensor
    units: Tensor
    inner: Tensor

    @classmethod
    def of(cls, hood: Neighborhood, axis: int, length: int, tile: int, unit: int) -> _Axis:
        start, end = hood.bounds(axis, length)
        first = torch.arange(0, length, tile)
        last = (first + tile).clamp(max=length) - 1
        # windows move monotonically: the first and last rows of a tile tell the hull and the core
        low, high = start[first] // unit, torch.div(end[last] + unit - 1, unit, rounding_mode="floor")
        units = low.unsqueeze(1) + torch.arange(int((high - low).max()))
        real = units < high.unsqueeze(1)
        inner = (units * unit >= start[last].unsqueeze(1)) & ((units + 1) * unit <= end[first].unsqueeze(1))
        return cls(length, tile, unit, start, end, units.masked_fill(~real, -1), inner & real)

    @property
    def fine(self) -> bool:
        return bool(((self.units >= 0) & ~self.inner).any())

    def masked(self, only_fringe: bool) -> Tensor:
        """Coordinates of each tile that must be told apart, `(T, F)`, -1 where there is none."""
        chosen = (self.units >= 0) & ~self.inner if only_fringe else self.units >= 0
        inside = self.units.unsqueeze(-1) * self.unit + torch.arange(self.unit)
        return torch.where(chosen.unsqueeze(-1), inside, -1).flatten(1)

    def forbidden(self, modulus: int, only_fringe: bool) -> Tensor:
        """`(length, modulus)` bool: residues of coordinates that a row's tile reads and the row does not."""
        coordinates = self.masked(only_fringe)
        table = torch.full((coordinates.shape[0], modulus + 1), -1)
        # what is no coordinate goes to a column that is cut off
        table.scatter_(1, torch.where(coordinates >= 0, coordinates % modulus, modulus), coordinates)
        mine = table[:, :modulus][torch.arange(self.length) // self.tile]
        return (mine >= 0) & ((mine < self.start.unsqueeze(1)) | (mine >= self.end.unsqueeze(1)))


@lru_cache(maxsize=32)
def grid_lists(hood: Neighborhood, tile: tuple[int, ...], key_tile: tuple[int, ...] | None, extra: int, device: str) -> GridLists:
    """The lists of a neighbourhood for query tiles of `tile`, and key tiles of `key_tile` (None: single keys), coordinates per axis."""
    unit = key_tile or (1,) * hood.rank
    groups = {r: [_Axis.of(hood, a, n, tile[a], unit[a]) for a, n in enumerate(hood.extents(r))] for r in hood.residues()}
    by_axis = [[axes[a] for axes in groups.values()] for a in range(hood.rank)]
    fine = [a for a, axes in enumerate(by_axis) if any(axis.fine for axis in axes)]
    # with one such axis, the keys that all rows of a tile read need no bits, so that P is small: they are read from a plain copy
    twice = len(fine) == 1
    modulus = {a: _modulus([axis.masked(twice) for axis in by_axis[a]]) for a in fine}
    size, count = math.prod(tile), math.prod(unit)
    slots = sum(math.prod(math.ceil(axis.length / axis.unit) for axis in axes) * count for axes in groups.values())

    rows, real_rows, keys, lists, row_bits, key_bits, done = [], [], [], [], [], [], 0
    for residue, axes in groups.items():
        coordinates = _tiled([axis.length for axis in axes], tile)
        real_rows.append(_inside(coordinates, axes))
        rows.append(_tokens(hood, residue, coordinates, axes))
        at_keys = _tiled([axis.length for axis in axes], unit)
        tokens = _tokens(hood, residue, at_keys, axes)
        keys.append(tokens)
        if fine:
            clamped = [x.clamp(max=axis.length - 1) for x, axis in zip(coordinates, axes, strict=True)]
            row_bits.append(torch.cat([axes[a].forbidden(modulus[a], twice)[clamped[a]] for a in fine], 1))
            key_bits.append(torch.cat([torch.nn.functional.one_hot(at_keys[a] % modulus[a], modulus[a]).bool() for a in fine], 1))
        ids, fringe = _boxes(axes)
        starts = torch.where(ids >= 0, tokens[ids] if key_tile is None else ids * count + done, -1)
        lists.append(torch.where(fringe & (ids >= 0), starts + slots, starts) if twice else starts)
        done += tokens.shape[0]

    row, key = torch.cat(rows), torch.cat(keys)
    bits = torch.cat(key_bits) if fine else None
    if bits is not None and key_tile is None:
        natural = torch.empty_like(bits)
        natural[key] = bits
        bits = natural
    where = torch.cat(real_rows).nonzero().squeeze(1)
    places = torch.empty(hood.tokens, dtype=torch.int64)
    places[row[where]] = where
    selection = _selection(lists, row.shape[0], slots * (1 + twice), extra, size, count)

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    return GridLists(
        rows=row.to(device), places=places.to(device), keys=None if key_tile is None else key.to(device),
        row_bits=there(torch.cat(row_bits) if fine else None), key_bits=there(bits), twice=twice, extra=extra,
        selection=_moved(selection, device),
    )  # fmt: skip


def _tiled(lengths: list[int], tile: tuple[int, ...]) -> list[Tensor]:
    """Coordinates along each axis of a grid, filled up to whole tiles, tile by tile: `(padded tokens,)` each."""
    axes = []
    for n, t in zip(lengths, tile, strict=True):
        axes.append(torch.arange(math.ceil(n / t) * t).view(-1, t))
    rank = len(axes)
    out = []
    for a, x in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = x.shape
        full = [y.shape[0] for y in axes] + [y.shape[1] for y in axes]
        out.append(x.reshape(shape).expand(full).flatten())
    return out


def _inside(coordinates: list[Tensor], axes: list[_Axis]) -> Tensor:
    inside = torch.ones_like(coordinates[0], dtype=torch.bool)
    for x, axis in zip(coordinates, axes, strict=True):
        inside &= x < axis.length
    return inside


def _tokens(hood: Neighborhood, residue: tuple[int, ...], coordinates: list[Tensor], axes: list[_Axis]) -> Tensor:
    """Tokens at coordinates of a dilation group; past its end the last one of the axis."""
    token = torch.zeros_like(coordinates[0])
    for x, axis, r, d, n in zip(coordinates, axes, residue, hood.dilation, hood.grid, strict=True):
        token = token * n + r + x.clamp(max=axis.length - 1) * d
    return token


def _boxes(axes: list[_Axis]) -> tuple[Tensor, Tensor]:
    """Units of each query tile's box as indices into the tiled order of units `(tiles, units)`, -1 past the end, and which of them
    some row does not read whole."""
    rank = len(axes)
    ids, fringe, real = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.bool), torch.ones((), dtype=torch.bool)
    for a, axis in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[a], shape[rank + a] = axis.units.shape
        units = axis.units.view(shape)
        ids = ids * math.ceil(axis.length / axis.unit) + units.clamp(min=0)
        real = real & (units >= 0)
        fringe = fringe | ~axis.inner.view(shape)
    tiles = math.prod(axis.units.shape[0] for axis in axes)
    return ids.masked_fill(~real, -1).reshape(tiles, -1), fringe.expand(ids.shape).reshape(tiles, -1)


def _modulus(tiles: list[Tensor]) -> int:
    """The least P modulo which the coordinates `(T, F)` (-1: none) of each tile differ, for all the tables given."""
    counts = max(int((x >= 0).sum(1).max()) for x in tiles)
    modulus = counts
    while not all(_distinct(x, modulus) for x in tiles):
        modulus += 1
    return modulus


def _distinct(coordinates: Tensor, modulus: int) -> bool:
    seen = torch.zeros(coordinates.shape[0], modulus + 1, dtype=torch.int64)
    residues = torch.where(coordinates >= 0, coordinates % modulus, modulus)
    return int(seen.scatter_add_(1, residues, torch.ones_like(residues))[:, :modulus].max()) <= 1


def _selection(lists: list[Tensor], n_q: int, slots: int, extra: int, block_q: int, block_k: int) -> Selection:
    n_k = slots + extra
    longest = max(x.shape[1] for x in lists)
    ids = torch.cat([torch.nn.functional.pad(x, (0, longest - x.shape[1]), value=-1) for x in lists])
    ids = torch.cat([ids, torch.arange(slots, n_k, block_k).expand(ids.shape[0], -1)], 1)
    ids = torch.sort(ids.masked_fill(ids < 0, n_k), 1).values.to(torch.int32)
    counts = (ids < n_k).sum(1, dtype=torch.int32)
    ids, counts = ids[None, None, :, : int(counts.max())], counts[None, None]
    none, zero = ids[..., :0], torch.zeros_like(counts)
    tiles = block_k > 1
    return Selection(
        n_q=n_q, n_k=n_k, block_q=block_q, block_k=block_k, starts=ids if tiles else none, start_counts=counts if tiles else zero,
        tokens=none if tiles else ids, token_counts=zero if tiles else counts, causal=False,
    )  # fmt: skip


def _moved(selection: Selection, device: str) -> Selection:
    from dataclasses import replace

    names = ("starts", "start_counts", "tokens", "token_counts")
    return replace(selection, **{name: getattr(selection, name).contiguous().to(device) for name in names})
