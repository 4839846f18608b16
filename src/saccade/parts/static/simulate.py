"""The analytical simulator of gna: how many key tiles a choice of window, stride and tiles makes a kernel visit, without running one.

For each query tile the windows of its rows have a hull [lo, hi) along each axis. Key tiles visited along the axis:

    static   floor((hi - 1) / T) - floor(lo / T) + 1     key tiles at multiples of T
    dynamic  ceil((hi - lo) / T)                         key tiles that begin at lo

and the product over the axes in all. The speed-up that tiles allow is all key tiles / the mean visited; the FLOP bound is the
product of extent / window. Perfectly block-sparse: both agree. Source: gna, arXiv 2504.16922, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.parts.static.gridlists import grid_lists
from saccade.parts.static.neighborhood import Neighborhood


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """flop_bound: speed-up if time followed score pairs. static, dynamic: speed-ups that tiles allow, over visiting every key tile.
    visited_static, visited_dynamic: mean key tiles per query tile. key_tiles: key tiles in all.
    fill: share of the rows of query tiles that hold a token. aligned: every window covers whole key tiles at multiples of T."""

    flop_bound: float
    static: float
    dynamic: float
    visited_static: float
    visited_dynamic: float
    key_tiles: int
    fill: float
    aligned: bool

    @property
    def perfect(self) -> bool:
        """Whether static tiling loses nothing against the FLOP bound."""
        return self.aligned and math.isclose(self.static, self.flop_bound, rel_tol=1e-9)


def simulate(hood: Neighborhood, tile: tuple[int, ...], key_tile: tuple[int, ...] | None = None) -> Simulation:
    """The simulator for query tiles of `tile` and key tiles of `key_tile` (default: the same) coordinates along each axis."""
    unit = key_tile or tile
    visited = torch.zeros(2, dtype=torch.float64)
    query_tiles, all_tiles, rows, aligned = 0, 0, 0, True
    for residue in hood.residues():
        static, dynamic, tiles, units = torch.ones(1), torch.ones(1), 1, 1
        for axis, length in enumerate(hood.extents(residue)):
            start, end = hood.bounds(axis, length)
            first = torch.arange(0, length, tile[axis])
            low, high = start[first], end[(first + tile[axis]).clamp(max=length) - 1]
            t = unit[axis]
            static = torch.outer(static, ((high - 1) // t - low // t + 1).float()).flatten()
            dynamic = torch.outer(dynamic, torch.div(high - low + t - 1, t, rounding_mode="floor").float()).flatten()
            tiles, units = tiles * len(first), units * math.ceil(length / t)
            aligned = aligned and _aligned(start, end, length, tile[axis], t)
        visited += torch.stack([static.double().sum(), dynamic.double().sum()])
        query_tiles, all_tiles = query_tiles + tiles, all_tiles + units
        rows += tiles * math.prod(tile)
    # self attention reads the key tiles of every dilation group
    every = all_tiles * query_tiles
    return Simulation(
        flop_bound=hood.flop_bound, static=every / float(visited[0]), dynamic=every / float(visited[1]),
        visited_static=float(visited[0]) / query_tiles, visited_dynamic=float(visited[1]) / query_tiles,
        key_tiles=all_tiles, fill=hood.tokens / rows, aligned=aligned,
    )  # fmt: skip


def _aligned(start: Tensor, end: Tensor, length: int, tile: int, unit: int) -> bool:
    own = torch.arange(length) // tile
    whole = ((start % unit) == 0) & (((end % unit) == 0) | (end == length))
    alike = start == start[own * tile]
    return bool((whole & alike).all())


def measure(hood: Neighborhood, tile: tuple[int, ...], key_tile: tuple[int, ...] | None = None) -> tuple[float, float]:
    """The same two speed-ups counted in the Selections that attention runs on: static from the key tiles they list, dynamic from the
    boxes of keys they list one by one."""
    unit = key_tile or tile
    slots = sum(math.prod(math.ceil(n / u) for n, u in zip(hood.extents(r), unit, strict=True)) for r in hood.residues())
    listed = grid_lists(hood, tile, unit, 0, "cpu").selection
    counts = listed.start_counts if math.prod(unit) > 1 else listed.token_counts
    boxes = _box_tiles(hood, grid_lists(hood, tile, None, 0, "cpu").selection, unit)
    return slots / float(counts.double().mean()), slots / boxes


def _box_tiles(hood: Neighborhood, listed: Selection, unit: tuple[int, ...]) -> float:
    """Mean number of key tiles of `unit` that fit round the box of keys each query tile lists, tiles beginning where the box does."""
    tokens = listed.tokens[0, 0].long() % hood.tokens
    real = torch.arange(tokens.shape[1]) < listed.token_counts[0, 0].unsqueeze(1)
    boxes = torch.ones(tokens.shape[0], dtype=torch.float64)
    rest = tokens
    for extent, dilation, t in reversed(list(zip(hood.grid, hood.dilation, unit, strict=True))):
        coordinate = rest % extent // dilation
        rest = rest // extent
        span = coordinate.masked_fill(~real, -1).amax(1) - coordinate.masked_fill(~real, extent).amin(1) + 1
        boxes *= torch.div(span + t - 1, t, rounding_mode="floor")
    return float(boxes.mean())
