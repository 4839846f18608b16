"""How a tensor falls into sets that share parameters, as the few sizes and strides that kernels walk along."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.gpu import ceil_div, next_power_of_two

WIDEST = 1024  # a last axis up to this is compiled in
TILE = 4096  # values that a program holds; twice as many where sets lie across each other
LONGEST = 8192  # values of a set that one program holds
LONGEST_ACROSS = 512  # the same where sets lie across each other: then a program holds 16 sets or more


@dataclass(frozen=True)
class Sets:
    """Set (o, k) of outer and inner sets holds `length` values. An inner set k is (k // run, k % run) of two axes and a value r
    (r // segment, r % segment) of two axes, where run and segment aren't 0. Strides: (outer, outer, inner, inner, length, length),
    of the tensor given and of one made in its order without gaps."""

    outer: tuple[int, int]
    inner: int
    run: int
    length: int
    segment: int
    given: tuple[int, ...]
    made: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.outer[0] * self.outer[1] * self.inner

    @property
    def across(self) -> bool:
        """Whether neighbours in memory belong to different sets."""
        return self.length > 1 and self.made[5] > 1

    @property
    def fits(self) -> bool:
        """Whether a program can hold whole sets."""
        return self.length <= (LONGEST_ACROSS if self.across else LONGEST)

    def tile(self) -> tuple[int, int, int]:
        """(sets, values of each) that a program works on at a time, and its warps."""
        if self.across:
            red = min(next_power_of_two(self.length), LONGEST_ACROSS if self.fits else 64)
            keep = max(16, min(64, 2 * TILE // red))
        else:
            red = min(next_power_of_two(self.length), LONGEST if self.fits else TILE)
            keep = max(1, TILE // red)
        keep = min(keep, next_power_of_two(self.inner))
        # a thread that takes more values of a set shares what is found for it
        return keep, red, min(8, max(1, keep * red // (2048 if self.across else 1024)))

    def eights(self, strides: tuple[int, ...]) -> int:
        """Whether 8 neighbours of sets (1) or of values (2) follow each other in memory, with these strides; 0 if none do."""
        if self.across:
            return 1 if strides[3] == 1 and self.run % 8 == 0 and self.inner >= 8 else 0
        return 2 if strides[5] == 1 and self.segment % 8 == 0 and self.length >= 8 else 0

    def tiles(self, keep: int) -> int:
        """Programs that cover the inner sets."""
        return ceil_div(self.inner, keep)


def sets_of(x: Tensor, shared: tuple[bool, ...], fixed: int) -> Sets | None:
    """The sets of x, whose axes are each `shared` by the values of a set or not; None if they are more than kernels walk along.

    fixed: the first of the axes that don't grow with the tokens.
    """
    levels: list[list[int]] = []  # size, stride, stride of what is made, shared, fixed
    made = x.numel()
    for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        made //= max(size, 1)
        if size == 1:
            continue
        if levels and levels[-1][3] == shared[axis] and levels[-1][1] == size * stride:
            size *= levels.pop()[0]
            levels.append([size, stride, made, shared[axis], False])
        else:
            levels.append([size, stride, made, shared[axis], axis >= fixed])
    values, sets = ([level for level in levels if bool(level[3]) == which] for which in (True, False))
    nested = len(sets) > 1 and bool(sets[-1][4]) and sets[-1][0] <= WIDEST
    first = len(sets) - (2 if nested else 1)
    inner, outer = sets[max(first, 0) :], sets[: max(first, 0)]
    if len(values) > 2 or len(outer) > 2 or any(_size(some) >= 1 << 30 for some in (values, inner)):
        return None
    outer, inner, values = ([[1, 0, 0]] * (2 - len(some)) + some for some in (outer, inner, values))
    walk = [*outer, *inner, *values]
    return Sets(
        outer=(outer[0][0], outer[1][0]), inner=_size(inner), run=inner[1][0] if inner[0][0] > 1 else 0, length=_size(values),
        segment=values[1][0] if values[0][0] > 1 else 0, given=tuple(level[1] for level in walk), made=tuple(level[2] for level in walk),
    )  # fmt: skip


def by_axes(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Sets] | None:
    """(x, its sets) where these axes are shared, x copied if it is walked along only then; None if not even then."""
    shared = tuple(axis in axes for axis in range(x.ndim))
    # of a last axis in groups, both parts stay as they are
    fixed = x.ndim - (2 if axes == (x.ndim - 1,) else 1)
    for given in (x, x.contiguous()):
        sets = sets_of(given, shared, fixed)
        if sets is not None:
            return given, sets
    return None


def by_parameters(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Sets, tuple[Tensor, ...]] | None:
    """(x, the sets that share an entry of each parameter, the parameters flat); None where kernels can't walk along them."""
    try:
        shape = torch.broadcast_shapes(*(p.shape for p in parameters))
    except RuntimeError:
        return None
    if len(shape) > x.ndim:
        return None
    shape = (*(1,) * (x.ndim - len(shape)), *shape)
    sizes: list[int] = []
    shared: list[bool] = []
    fixed = 0
    for have, size in zip(shape, x.shape, strict=True):
        fixed = len(sizes)
        if have in (1, size):
            sizes.append(size)
            shared.append(have != size)
        elif have and size % have == 0:
            sizes += [have, size // have]
            shared += [False, True]
        else:
            return None
    for given in (x, x.contiguous()):
        sets = sets_of(given.view(sizes), tuple(shared), fixed)
        if sets is not None:
            return given, sets, tuple(p.expand(shape).contiguous().view(-1) for p in parameters)
    return None


def _size(levels: list[list[int]]) -> int:
    size = 1
    for level in levels:
        size *= level[0]
    return size
