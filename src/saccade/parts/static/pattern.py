"""Static patterns: which keys a query may read, as a function of positions and head alone.

    window(w)          |D| < w            D = floor(i / block) - floor(j / block), the distance in blocks of query i and key j
    sink(m)            floor(j / block) < m
    stride(v, offset)  (floor(j / block) + offset) mod v == 0           absolute in j, so that columns stay or go for good
    pow2()             D = 0 or |D| a power of two
    group(g, shift)    floor((i + shift) / g) == floor((j + shift) / g)  tokens
    since(p)           i >= p, a bound on queries alone

joined by `|` and `&`. Every number may be a tuple, one entry a head. Causality (j <= i) is added where a pattern is compiled.
Sources: s2-attention 2407.17678, longlora 2309.12307, longgen 2410.01485, powerattention 2503.03588, moa 2406.14909.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PerHead = int | tuple[int, ...]


class Bounds(NamedTuple):
    """What is known of tiles of a map, bool each: `some` pair may be read (an upper bound), `surely` some pair is (a lower bound),
    `all` visible pairs are (a lower bound)."""

    some: Tensor
    surely: Tensor
    all: Tensor


class Ranges(NamedTuple):
    """Tiles as ranges of positions, int64, broadcasting: queries q0 ... q1 - 1, keys k0 ... k1 - 1. With causal only pairs
    k <= q count, and k1 <= q1, k0 < q1 are given."""

    q0: Tensor
    q1: Tensor
    k0: Tensor
    k1: Tensor
    causal: bool


class Pattern(ABC):
    """Immutable and hashable. In all methods axis 0 of a tensor of positions is the head axis (1: all heads alike)."""

    @property
    @abstractmethod
    def heads(self) -> int:
        """How many heads it tells apart, 1 for a pattern of all heads."""

    @property
    def evictable(self) -> bool:
        """Whether a key that a later query can't read is read by none after that: once out of view, it can go for good."""
        return True

    @abstractmethod
    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        """Whether the query at position q may read key k, before causality: int64 `(1 or H, ...)` each to bool `(H, ...)`."""

    @abstractmethod
    def tiles(self, at: Ranges) -> Bounds:
        """What is known of whole tiles."""

    @abstractmethod
    def needed(self, k: Tensor, t: int) -> Tensor:
        """Whether any query after position t may read key k <= t; never False for one that is read later."""

    def __or__(self, other: Pattern) -> Pattern:
        return AnyOf(self, other)

    def __and__(self, other: Pattern) -> Pattern:
        return AllOf(self, other)


def _heads(*values: PerHead) -> int:
    lengths = {len(v) for v in values if isinstance(v, tuple) and len(v) > 1}
    if len(lengths) > 1:
        raise ValueError(f"a pattern got numbers for {' and '.join(map(str, sorted(lengths)))} heads: give the same number of heads")
    return lengths.pop() if lengths else 1


def _number(name: str, value: int | Sequence[int], least: int) -> PerHead:
    many = isinstance(value, Sequence)
    for one in value if isinstance(value, Sequence) else (value,):
        if isinstance(one, bool) or not isinstance(one, int) or one < least:
            raise ValueError(f"{name} is {value!r}: expected whole numbers of at least {least}, one or one a head")
    if many and not len(value):
        raise ValueError(f"{name} is empty: give one number, or one a head")
    return tuple(value) if isinstance(value, Sequence) else value


def _spread(value: PerHead, like: Tensor) -> Tensor | int:
    """A number, or one a head along axis 0 of `like`."""
    if isinstance(value, int):
        return value
    return torch.tensor(value, device=like.device).view(-1, *(1,) * (like.ndim - 1))


def _floor(x: Tensor, by: Tensor | int) -> Tensor:
    return torch.div(x, by, rounding_mode="floor")


@dataclass(frozen=True)
class Window(Pattern):
    size: PerHead
    block: int = 1

    @property
    def heads(self) -> int:
        return _heads(self.size)

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        distance = (_floor(q, self.block) - _floor(k, self.block)).abs()
        return distance < _spread(self.size, distance)

    def tiles(self, at: Ranges) -> Bounds:
        nearest, furthest = _distances(at, self.block)
        size = _spread(self.size, nearest)
        some = nearest < size
        return Bounds(some, some, furthest < size)

    def needed(self, k: Tensor, t: int) -> Tensor:
        distance = (t + 1) // self.block - _floor(k, self.block)
        return distance < _spread(self.size, distance)


@dataclass(frozen=True)
class Sink(Pattern):
    size: PerHead
    block: int = 1

    @property
    def heads(self) -> int:
        return _heads(self.size)

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        place = _floor(k, self.block) + torch.zeros_like(q)
        return place < _spread(self.size, place)

    def tiles(self, at: Ranges) -> Bounds:
        first, last = _floor(at.k0, self.block) + torch.zeros_like(at.q0), _floor(at.k1 - 1, self.block)
        size = _spread(self.size, first)
        return Bounds(first < size, first < size, last < size)

    def needed(self, k: Tensor, t: int) -> Tensor:
        return _floor(k, self.block) < _spread(self.size, k)


@dataclass(frozen=True)
class Stride(Pattern):
    every: PerHead
    offset: PerHead = 0
    block: int = 1

    @property
    def heads(self) -> int:
        return _heads(self.every, self.offset)

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        place = _floor(k, self.block) + torch.zeros_like(q)
        return (place + _spread(self.offset, place)) % _spread(self.every, place) == 0

    def tiles(self, at: Ranges) -> Bounds:
        first, last = _floor(at.k0, self.block) + torch.zeros_like(at.q0), _floor(at.k1 - 1, self.block)
        every, offset = _spread(self.every, first), _spread(self.offset, first)
        # multiples of `every` up to the last block and before the first one
        some = _floor(last + offset, every) > _floor(first + offset - 1, every)
        return Bounds(some, some, some & ((first == last) | (torch.as_tensor(every, device=first.device) == 1)))

    def needed(self, k: Tensor, t: int) -> Tensor:
        return self.allow(torch.zeros_like(k), k)


@dataclass(frozen=True)
class Pow2(Pattern):
    block: int = 1

    @property
    def heads(self) -> int:
        return 1

    @property
    def evictable(self) -> bool:
        return False

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        distance = (_floor(q, self.block) - _floor(k, self.block)).abs()
        return (distance & (distance - 1)) == 0

    def tiles(self, at: Ranges) -> Bounds:
        nearest, furthest = _distances(at, self.block)
        # frexp is exact: the greatest power of two that is not above `furthest`
        power = torch.pow(2.0, torch.frexp(furthest.clamp(min=1).double()).exponent - 1).long()
        some = (nearest == 0) | ((power >= nearest) & (furthest > 0))
        return Bounds(some, some, (furthest <= 2) | ((nearest == furthest) & (power == furthest)))

    def needed(self, k: Tensor, t: int) -> Tensor:
        return torch.ones_like(k, dtype=torch.bool)  # the next power of two is still to come


@dataclass(frozen=True)
class Group(Pattern):
    size: PerHead
    shift: PerHead = 0

    @property
    def heads(self) -> int:
        return _heads(self.size, self.shift)

    def _of(self, positions: Tensor) -> Tensor:
        return _floor(positions + _spread(self.shift, positions), _spread(self.size, positions))

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self._of(q) == self._of(k)

    def tiles(self, at: Ranges) -> Bounds:
        q0, q1, k0, k1 = self._of(at.q0), self._of(at.q1 - 1), self._of(at.k0), self._of(at.k1 - 1)
        some = torch.maximum(q0, k0) <= torch.minimum(q1, k1)
        return Bounds(some, some, (q0 == q1) & (k0 == k1) & (q0 == k0))

    def needed(self, k: Tensor, t: int) -> Tensor:
        return self._of(k) == self._of(torch.full_like(k, t + 1))


@dataclass(frozen=True)
class Since(Pattern):
    start: PerHead

    @property
    def heads(self) -> int:
        return _heads(self.start)

    @property
    def evictable(self) -> bool:
        return False

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        place = q + torch.zeros_like(k)
        return place >= _spread(self.start, place)

    def tiles(self, at: Ranges) -> Bounds:
        last, first = at.q1 - 1 + torch.zeros_like(at.k0), at.q0 + torch.zeros_like(at.k0)
        some = last >= _spread(self.start, last)
        return Bounds(some, some, first >= _spread(self.start, first))

    def needed(self, k: Tensor, t: int) -> Tensor:
        return torch.ones_like(k, dtype=torch.bool)  # some later query stands behind the start


@dataclass(frozen=True)
class AnyOf(Pattern):
    first: Pattern
    second: Pattern

    @property
    def heads(self) -> int:
        return _common(self.first, self.second)

    @property
    def evictable(self) -> bool:
        return self.first.evictable and self.second.evictable

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self.first.allow(q, k) | self.second.allow(q, k)

    def tiles(self, at: Ranges) -> Bounds:
        a, b = self.first.tiles(at), self.second.tiles(at)
        return Bounds(a.some | b.some, a.surely | b.surely, a.all | b.all)

    def needed(self, k: Tensor, t: int) -> Tensor:
        return self.first.needed(k, t) | self.second.needed(k, t)


@dataclass(frozen=True)
class AllOf(Pattern):
    first: Pattern
    second: Pattern

    @property
    def heads(self) -> int:
        return _common(self.first, self.second)

    @property
    def evictable(self) -> bool:
        return self.first.evictable and self.second.evictable

    def allow(self, q: Tensor, k: Tensor) -> Tensor:
        return self.first.allow(q, k) & self.second.allow(q, k)

    def tiles(self, at: Ranges) -> Bounds:
        a, b = self.first.tiles(at), self.second.tiles(at)
        return Bounds(a.some & b.some, (a.all & b.surely) | (a.surely & b.all), a.all & b.all)

    def needed(self, k: Tensor, t: int) -> Tensor:
        return self.first.needed(k, t) & self.second.needed(k, t)


def _common(a: Pattern, b: Pattern) -> int:
    if a.heads != b.heads and 1 not in (a.heads, b.heads):
        raise ValueError(f"patterns of {a.heads} and {b.heads} heads can't be joined: give them the same number of heads, or 1")
    return max(a.heads, b.heads)


def _distances(at: Ranges, block: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest distance in blocks between a query and a key of each tile; every one between occurs."""
    low = _floor(at.q0, block) - _floor(at.k1 - 1, block)
    high = _floor(at.q1 - 1, block) - _floor(at.k0, block)
    if at.causal:
        return low.clamp(min=0), high
    crosses = (low <= 0) & (high >= 0)
    return torch.minimum(low.abs(), high.abs()).masked_fill(crosses, 0), torch.maximum(low.abs(), high.abs())


def window(size: int | Sequence[int], *, block: int = 1) -> Pattern:
    """Keys fewer than `size` blocks away, the query's own block included; size at least 1."""
    _number("block", block, 1)
    return _checked(Window(_number("window size", size, 1), block))


def sink(size: int | Sequence[int], *, block: int = 1) -> Pattern:
    """The first `size` blocks of the sequence."""
    _number("block", block, 1)
    return _checked(Sink(_number("sink size", size, 0), block))


def stride(every: int | Sequence[int], offset: int | Sequence[int] = 0, *, block: int = 1) -> Pattern:
    """Key blocks j with (j + offset) mod every == 0. Give each head its own offset and together they see the whole context."""
    _number("block", block, 1)
    return _checked(Stride(_number("stride", every, 1), _number("stride offset", offset, 0), block))


def head_offsets(every: int, heads: int) -> tuple[int, ...]:
    """Offsets that spread the residues of a stride over the heads as evenly as they go: h * max(1, floor(every / heads)).

    Source: s2-attention, arXiv 2407.17678 (h is the key/value head; with every > heads, residues stay uncovered).
    """
    return tuple(h * max(1, every // heads) % every for h in range(heads))


def pow2(*, block: int = 1) -> Pattern:
    """Keys in the query's own block and at block distances 1, 2, 4, 8, ..."""
    _number("block", block, 1)
    return Pow2(block)


def group(size: int | Sequence[int], shift: int | Sequence[int] = 0) -> Pattern:
    """Tokens of the query's own group of `size`; shifted, the borders lie at size - shift, 2 * size - shift, ..."""
    return _checked(Group(_number("group size", size, 1), _number("group shift", shift, 0)))


def since(start: int | Sequence[int]) -> Pattern:
    """Everything, for queries from position `start` on; to be joined with others by `&`."""
    return _checked(Since(_number("first query", start, 0)))


def _checked(pattern: Pattern) -> Pattern:
    _ = pattern.heads  # ValueError where numbers are given for different numbers of heads
    return pattern
