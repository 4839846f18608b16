"""Neighbourhoods on a grid: for every token a box of keys around it, along each axis a window that may stride, dilate and be causal.

Along an axis of extent L (of a dilation group), with window w and stride s, coordinate i belongs to the stride group whose leader
is c, and reads `[start, end)`:

    not causal:  c = min(floor(i / s) * s + floor(s / 2), L - 1),  start = clamp(c - floor(w / 2), 0, L - w),  end = start + w
    causal:      c = min(floor(i / s) * s + s - 1, L - 1),         start = max(c - w + 1, 0),                   end = i + 1

With dilation D only coordinates of the same residue mod D meet, and i = floor(x / D). Source: gna, arXiv 2504.16922; with s = 1 it
is fna, arXiv 2403.04690.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

PerAxis = int | Sequence[int]


def window_bounds(
    length: int, window: int, stride: int = 1, causal: bool = False, *, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """start and end of the window of each coordinate of an axis, int64 `(length,)` each."""
    i = torch.arange(length, device=device)
    group = i // stride * stride
    if causal:
        leader = (group + stride - 1).clamp(max=length - 1)
        return (leader - window + 1).clamp(min=0), i + 1
    leader = (group + stride // 2).clamp(max=length - 1)
    start = (leader - window // 2).clamp(min=0, max=length - window)
    return start, start + window


@dataclass(frozen=True, kw_only=True)
class Neighborhood:
    """Sizes along each axis of a grid of 1 to 3 axes, the last one running fastest; make it with `Neighborhood.of`.

    grid: tokens. window: keys read, at most grid / dilation. stride: queries that share a window, 1 ... window. dilation: distance
    of neighbours. causal: whether a window ends at its query.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @classmethod
    def of(
        cls, grid: PerAxis, window: int | Sequence[int | None] | None, stride: PerAxis = 1, dilation: PerAxis = 1,
        causal: bool | Sequence[bool] = False,
    ) -> Neighborhood:  # fmt: skip
        """One number stands for all axes; a window of None for the whole axis. Raises ValueError on sizes that don't fit."""
        extents = tuple(grid) if isinstance(grid, Sequence) else (grid,)
        rank = len(extents)
        if not 1 <= rank <= 3:
            raise ValueError(f"a grid of {rank} axes {extents}: neighbourhoods have 1, 2 or 3")

        def spread(name: str, value: object) -> tuple:
            values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
            if len(values) != rank:
                raise ValueError(f"{name} {values} does not fit a grid of {rank} axes: give one number, or one for each axis")
            return values

        dilations, strides, causals = spread("dilation", dilation), spread("stride", stride), spread("causal", causal)
        for name, values in (("grid", extents), ("dilation", dilations), ("stride", strides)):
            if any(isinstance(x, bool) or not isinstance(x, int) or x < 1 for x in values):
                raise ValueError(f"{name} {values}: expected whole numbers of at least 1")
        windows = tuple(n // d if w is None else w for w, n, d in zip(spread("window", window), extents, dilations, strict=True))
        for w, s, d, n in zip(windows, strides, dilations, extents, strict=True):
            if isinstance(w, bool) or not isinstance(w, int) or w < 1 or w * d > n:
                raise ValueError(f"a window of {w} with dilation {d} on an axis of {n}: window * dilation must be 1 ... {n}")
            if s > w:
                raise ValueError(f"stride {s} with a window of {w}: the stride must be 1 ... {w}, or queries would miss themselves")
        if any(not isinstance(c, bool) for c in causals):
            raise ValueError(f"causal {causals}: expected true or false for each axis")
        return cls(grid=extents, window=windows, stride=strides, dilation=dilations, causal=causals)

    @property
    def rank(self) -> int:
        return len(self.grid)

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def flop_bound(self) -> float:
        """How many times fewer score pairs than self attention has: the product of extent / window."""
        return math.prod(n / w for n, w in zip(self.grid, self.window, strict=True))

    def residues(self) -> list[tuple[int, ...]]:
        """The dilation groups, by their first coordinates."""
        return list(product(*(range(d) for d in self.dilation)))

    def extents(self, residue: tuple[int, ...]) -> tuple[int, ...]:
        """Extents of one dilation group; groups differ by one where the dilation does not divide the grid."""
        return tuple(math.ceil((n - r) / d) for n, r, d in zip(self.grid, residue, self.dilation, strict=True))

    def bounds(self, axis: int, length: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """`window_bounds` along one axis of a dilation group of that length."""
        return window_bounds(length, self.window[axis], self.stride[axis], self.causal[axis], device=device)
