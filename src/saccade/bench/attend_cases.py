"""Cases of `attend`: dense and sparse, forward and with the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import flex, peers
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Work
from saccade.bench.exact import AttentionCheck, SliceCheck
from saccade.bench.patterns import random_pages, random_tiles
from saccade.core import Selection
from saccade.ops import attend, estimate, last_run
from saccade.ops.attend import attend_low_bit
from saccade.ops.attend.low_bit.codes import QUERY_ROWS, rounded, rounded_values

TILE = 128


@dataclass(frozen=True)
class Shape:
    n: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def pairs(self) -> float:
        return self.batch * self.heads * self.n * (self.n + 1) / 2


def work(shape: Shape, pairs: float, size: int, grad: bool) -> Work:
    """Forward: 4 D operations a pair, q, k, v and out moved once. With the backward pass 14 D (the scores are computed again), and
    each of them moved once more with its gradient."""
    rows, keys = (shape.batch * heads * shape.n * shape.dim * size for heads in (shape.heads, shape.kv_heads))
    forward = 2 * rows + 2 * keys
    return Work(flops=(14 if grad else 4) * shape.dim * pairs, bytes=forward + (4 * rows + 4 * keys if grad else 0), unit="FLOP")


def _inputs(shape: Shape, s: Settings, grad: bool) -> peers.Inputs:
    generator = s.generator()
    q, k, v = (
        s.normal(shape.batch, h, shape.n, shape.dim, generator=generator).requires_grad_(grad)
        for h in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return peers.Inputs(q, k, v, True, s.normal(*q.shape, generator=generator) if grad else None)


def _ours(x: peers.Inputs, selection: Selection | None, s: Settings) -> Run:
    # a dense call that leaves the choice to saccade goes to torch's kernels: here its own kernel is what is measured
    impl: Any = "triton" if selection is None and s.cuda and s.impl == "auto" else s.impl

    def call() -> Tensor:
        return attend(x.q, x.k, x.v, selection, impl=impl).out

    return Run(
        call=peers.backward_of(call, (x.q, x.k, x.v), x.d_out), outputs=peers.outputs_of(x.d_out), impl=lambda: last_run().impl
    )


def _dense(shape: Shape, grad: bool, with_flex: bool, s: Settings) -> Field:
    x = _inputs(shape, s, grad)
    amount = work(shape, shape.pairs(), s.size, grad)
    contestants = [Contestant(name="saccade", role="ours", work=amount, make=lambda: _ours(x, None, s)), *peers.dense(x, amount)]
    if with_flex and s.cuda:
        contestants += flex.contestant(x, Selection.full(shape.n, shape.n, device=s.device), amount, "dense")
    return Field(contestants=contestants, check=AttentionCheck.of(x.q, x.k, x.v, d_out=x.d_out), density=1.0)


def _sparse(shape: Shape, pattern: str, density: float, grad: bool, with_flex: bool, s: Settings) -> Field:
    x = _inputs(shape, s, grad)
    select: Callable[[], Selection] | None = None
    if pattern == "tiles":
        selection = random_tiles(shape.n, shape.heads, TILE, density, s.device)
    elif pattern == "pooled top-k":
        grid = estimate.TileGrid.of(x.q, x.k, TILE, TILE)

        def choose() -> Selection:
            scores = estimate.pooled_scores(x.q, x.k, TILE, TILE)
            return estimate.choose_top_k(scores, density, grid, sinks=1, local=1)

        selection, select = choose(), choose
    else:
        # lists of single keys are long: one for each key/value head
        heads, page = (shape.heads, 16) if pattern == "pages of 16" else (shape.kv_heads, 1)
        selection = random_pages(shape.n, heads, TILE, page, density, s.device)
    found = selection.density()
    amount, whole = work(shape, shape.pairs() * found, s.size, grad), work(shape, shape.pairs(), s.size, grad)
    contestants = [
        Contestant(name="saccade", role="ours", work=amount, make=lambda: _ours(x, selection, s), select=select),
        *peers.dense(x, whole, checked=False),
    ]
    if with_flex and pattern == "tiles":
        contestants += flex.contestant(x, selection, amount, "peer")
    check = AttentionCheck.of(x.q, x.k, x.v, selection=selection, d_out=x.d_out)
    return Field(contestants=contestants, check=check, density=found)


def _low_bit(shape: Shape, pv: str, density: float | None, s: Settings) -> Field:
    """Products in int8, next to the same attention in the inputs' dtype. Errors are judged by what rounding alone costs."""
    x = _inputs(shape, s, False)
    selection = None if density is None else random_tiles(shape.n, shape.heads, TILE, density, s.device)
    found = 1.0 if selection is None else selection.density()
    amount, whole = work(shape, shape.pairs() * found, s.size, False), work(shape, shape.pairs(), s.size, False)

    def call() -> Tensor:
        values: Any = pv
        impl: Any = s.impl
        return attend_low_bit(x.q, x.k, x.v, selection, pv=values, impl=impl).out

    exact = AttentionCheck.of(x.q, x.k, x.v, selection=selection)
    mean = x.k.mean(2, keepdim=True, dtype=torch.float32)
    numbers = (
        rounded(x.q.float(), QUERY_ROWS, "int8"), rounded(x.k.float() - mean, 128, "int8") + mean, rounded_values(x.v.float(), pv)
    )  # fmt: skip
    known = AttentionCheck.of(*numbers, selection=selection)
    check = SliceCheck(
        slices=exact._slices, exact=lambda: exact._compute(torch.float64), plain=lambda: known._compute(torch.float32)
    )  # fmt: skip
    contestants = [
        Contestant(name="saccade", role="ours", work=amount, make=lambda: Run(call=call, impl=lambda: last_run().impl)),
        Contestant(name=f"saccade {s.dtype}".replace("torch.", ""), role="peer", work=amount, make=lambda: _ours(x, selection, s)),
        *peers.dense(x, whole, checked=selection is None),
    ]
    return Field(contestants=contestants, check=check, density=found)


def _need(shape: Shape, size: int, grad: bool) -> float:
    rows, keys = (shape.batch * heads * shape.n * shape.dim * size for heads in (shape.heads, shape.kv_heads))
    # repeated keys and values for kernels without groups, outputs, gradients in float32
    return (4 if grad else 1) * (4 * rows + 2 * keys) + 2**30 * (size == 2)


def dense_case(shape: Shape, grad: bool = False, with_flex: bool = False, size: int = 2) -> Case:
    return Case(
        family="dense forward+backward" if grad else "dense forward", shape=vars(shape).copy(), need=_need(shape, size, grad), grad=grad,
        build=partial(_dense, shape, grad, with_flex),
    )  # fmt: skip


def sparse_case(shape: Shape, pattern: str, density: float, grad: bool = False, with_flex: bool = False, size: int = 2) -> Case:
    tiles = -(-shape.n // TILE)
    lists = {"tiles": 30 * shape.heads * tiles**2, "pages of 16": 240 * shape.heads * tiles**2}.get(pattern, 0)
    lists = 20 * shape.kv_heads * tiles * shape.n if pattern == "single tokens" else lists
    return Case(
        family=f"{pattern} forward+backward" if grad else pattern, shape={**vars(shape), "density": density},
        need=_need(shape, size, grad) + lists, grad=grad, build=partial(_sparse, shape, pattern, density, grad, with_flex),
    )  # fmt: skip


def low_bit_case(shape: Shape, pv: str = "same", density: float | None = None, size: int = 2) -> Case:
    family = ("int8 dense" if density is None else "int8 tiles") + (", float8 values" if pv == "fp8" else "")
    lists = 0 if density is None else 30 * shape.heads * (-(-shape.n // TILE)) ** 2
    given = vars(shape).copy() if density is None else {**vars(shape), "density": density}
    return Case(
        family=family, shape=given, need=4 * _need(shape, size, False) + lists, build=partial(_low_bit, shape, pv, density)
    )  # fmt: skip


def cases(grid: str, cuda: bool) -> list[Case]:
    """Most telling first: what the time does not allow is left out at the end."""
    if not cuda:
        return _cpu(grid)
    if grid == "quick":
        return [
            *(dense_case(Shape(n)) for n in (2048, 8192, 32768)),
            *(sparse_case(Shape(32768), "tiles", d, with_flex=d == 0.1) for d in (0.1, 0.5, 0.05)),
            dense_case(Shape(8192), grad=True),
            sparse_case(Shape(16384), "tiles", 0.1, grad=True),
            sparse_case(Shape(8192), "pages of 16", 0.1),
            sparse_case(Shape(8192), "single tokens", 0.1),
            sparse_case(Shape(32768), "pooled top-k", 0.1),
            dense_case(Shape(8192, dim=64)),
            low_bit_case(Shape(32768)),
            low_bit_case(Shape(32768), density=0.1),
        ]
    if grid == "bars":
        return [
            dense_case(Shape(32768)),
            *(dense_case(Shape(n), grad=True) for n in (8192, 32768)),
            sparse_case(Shape(32768), "tiles", 0.1, with_flex=True),
            *(sparse_case(Shape(n), "tiles", 0.1, grad=True, with_flex=True) for n in (16384, 32768)),
            low_bit_case(Shape(32768)),
            sparse_case(Shape(131072), "tiles", 0.05, with_flex=True),
            *(sparse_case(Shape(131072), pattern, 0.1) for pattern in ("pages of 16", "single tokens")),
            *(dense_case(Shape(n)) for n in (8192, 131072)),
            sparse_case(Shape(32768), "pooled top-k", 0.1),
        ]
    lengths = [1024 * 2**i for i in range(8)]
    return [
        *(dense_case(Shape(n), with_flex=n == 32768) for n in lengths),
        *(sparse_case(Shape(32768), "tiles", d, with_flex=True) for d in (0.1, 0.05, 0.2, 0.5, 1.0, 0.01)),
        *(dense_case(Shape(n), grad=True) for n in lengths[:-1]),
        sparse_case(Shape(32768), "tiles", 0.1, grad=True, with_flex=True),
        sparse_case(Shape(32768), "pooled top-k", 0.1),
        *(low_bit_case(Shape(n), pv) for n in (8192, 32768) for pv in ("same", "fp8")),
        low_bit_case(Shape(32768), density=0.1),
        *(sparse_case(Shape(n), pattern, 0.1) for pattern in ("pages of 16", "single tokens") for n in (8192, 32768)),
        *(sparse_case(Shape(n), "tiles", 0.1) for n in (8192, 16384, 65536, 131072)),
        *(dense_case(Shape(8192, dim=d), grad=g) for d in (64, 256) for g in (False, True)),
        *(dense_case(Shape(8192, kv_heads=h), grad=g) for h in (32, 4) for g in (False, True)),
        *(dense_case(Shape(8192, batch=4), grad=g) for g in (False, True)),
        *(sparse_case(Shape(32768, dim=d), "tiles", 0.1) for d in (64, 256)),
        sparse_case(Shape(131072), "tiles", 0.01),
        dense_case(Shape(131072), grad=True),
    ]


def _cpu(grid: str) -> list[Case]:
    tiny = [Shape(n, heads=4, kv_heads=2, dim=32) for n in (256, 512, 1024)]
    if grid == "quick":
        return [
            *(dense_case(shape, size=4) for shape in tiny),
            dense_case(tiny[0], grad=True, size=4),
            *(sparse_case(tiny[-1], "tiles", d, size=4) for d in (0.5, 0.2)),
            sparse_case(tiny[-1], "pages of 16", 0.1, size=4),
            sparse_case(tiny[-1], "single tokens", 0.1, size=4),
            sparse_case(tiny[-1], "pooled top-k", 0.3, size=4),
            low_bit_case(tiny[0], size=4),
        ]
    larger = [Shape(n, heads=8, kv_heads=8, dim=64) for n in (1024, 2048, 4096, 8192)]
    return [
        *(dense_case(shape, size=4) for shape in larger),
        *(sparse_case(larger[-1], "tiles", d, size=4) for d in (0.1, 0.5, 0.2, 0.05, 1.0)),
        *(sparse_case(shape, "tiles", 0.1, size=4) for shape in larger[:-1]),
        *(sparse_case(larger[-2], pattern, 0.1, size=4) for pattern in ("pages of 16", "single tokens", "pooled top-k")),
        *(dense_case(shape, grad=True, size=4) for shape in larger[:-1]),
    ]
