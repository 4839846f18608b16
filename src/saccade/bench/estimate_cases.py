"""Cases of `estimate`: each function, next to the dense attention that its answer is to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import peers
from saccade.bench.case import Case, Check, Contestant, Field, Run, Settings, Work
from saccade.bench.choosing_cases import BATCH, STEP, Entry, dense_step, descend_tree
from saccade.bench.exact import EqualCheck, SliceCheck
from saccade.core import Selection
from saccade.ops import estimate
from saccade.ops.estimate import TileGrid, last_estimate

ROWS = 256  # query rows of a checked slice, whole tiles
PART = 2048  # tokens of a checked slice where means over all tokens matter


@dataclass(frozen=True)
class Shape:
    n: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    batch: int = 1

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows of a checked slice."""
        return min(ROWS, self.n)


def _tensors(shape: Shape, s: Settings) -> tuple[Tensor, Tensor]:
    generator = s.generator()
    q = s.normal(shape.batch, shape.heads, shape.n, shape.dim, generator=generator)
    # a mean that is not 0, as keys of models have
    return q, s.normal(shape.batch, shape.kv_heads, shape.n, shape.dim, generator=generator) + 0.3


def _bytes(*tensors: Tensor) -> float:
    return float(sum(x.numel() * x.element_size() for x in tensors))


def _check(
    s: Settings, slices: Callable[[tuple[Tensor, ...]], Sequence[Tensor]], run: Callable[[torch.dtype], Sequence[Tensor]]
) -> SliceCheck:
    return SliceCheck(slices=slices, exact=lambda: run(torch.float64), plain=lambda: run(s.dtype), dtype=s.dtype)


def _pooled_scores(shape: Shape, s: Settings) -> Entry:
    q, k = _tensors(shape, s)
    tiles, g = shape.n // 128, shape.group
    out = 4.0 * shape.batch * shape.heads * tiles**2
    check = _check(
        s, lambda o: (o[0][:1, :g],),
        lambda dtype: (estimate.pooled_scores(q[:1, :g].to(dtype), k[:1, :1].to(dtype), 128, 128, impl="reference"),),
    )  # fmt: skip
    amount = Work(flops=float(q.numel() + k.numel()) + 2 * shape.heads * shape.dim * tiles**2, bytes=_bytes(q, k) + out, unit="byte")
    return Entry(amount, lambda impl: estimate.pooled_scores(q, k, 128, 128, impl=impl), check)  # pyright: ignore[reportArgumentType]


def _keys_only(shape: Shape, s: Settings, what: str) -> Entry:
    """Functions of the keys alone: one vector or two per block."""
    k = _tensors(shape, s)[1]
    functions: dict[str, tuple[Callable[..., Any], int, int]] = {
        "pool blocks": (estimate.pool_blocks, 128, 4), "block statistics": (estimate.block_statistics, 64, 4),
        "min-max pages": (estimate.minmax_pages, 16, 2 * s.size),
    }  # fmt: skip
    function, block, size = functions[what]

    def as_tuple(raw: Any) -> tuple[Tensor, ...]:
        return tuple(raw) if isinstance(raw, tuple) else (raw,)

    check = _check(
        s, lambda o: tuple(x[:1, :1] for x in o), lambda dtype: as_tuple(function(k[:1, :1].to(dtype), block, impl="reference"))
    )
    amount = Work(flops=float(k.numel()) * 3, bytes=_bytes(k) + k.numel() / block * size, unit="byte")
    return Entry(amount, lambda impl: as_tuple(function(k, block, impl=impl)), check)


def _extend_pages(shape: Shape, s: Settings) -> Entry:
    k = _tensors(shape, s)[1]
    low, high = estimate.minmax_pages(k, 16)
    begin = shape.n - 5
    seen = torch.tensor([begin], device=s.device)
    exact = [x.clone() for x in (low, high)]

    def call(impl: str) -> tuple[Tensor, Tensor]:
        estimate.extend_pages(low, high, k[:, :, begin : begin + 1], seen, 16, impl=impl)  # pyright: ignore[reportArgumentType]
        return low, high

    amount = Work(flops=None, bytes=5.0 * shape.batch * shape.kv_heads * shape.dim * s.size, unit="byte")
    return Entry(amount, call, EqualCheck(slices=lambda o: o, exact=lambda: exact))


def _page_bounds(shape: Shape, s: Settings) -> Entry:
    q, k = _tensors(shape, s)
    low, high = estimate.minmax_pages(k, 16)
    one, g = q[:, :, -1:], shape.group
    check = _check(
        s, lambda o: (o[0][:1, :g],),
        lambda dtype: (
            estimate.page_bounds(one[:1, :g].to(dtype), low[:1, :1].to(dtype), high[:1, :1].to(dtype), impl="reference"),
        ),
    )  # fmt: skip
    pages = low.shape[2]
    amount = Work(
        flops=4.0 * shape.batch * shape.heads * pages * shape.dim, bytes=_bytes(low, high) + 4.0 * shape.batch * shape.heads * pages,
        unit="byte",
    )  # fmt: skip
    return Entry(amount, lambda impl: estimate.page_bounds(one, low, high, impl=impl), check)  # pyright: ignore[reportArgumentType]


def _row_sums(shape: Shape, s: Settings) -> Entry:
    q, k = _tensors(shape, s)
    last, g = q[:, :, -64:], shape.group

    def run(dtype: torch.dtype) -> tuple[Tensor, ...]:
        found = estimate.row_sums(last[:1, :g].to(dtype), k[:1, :1].to(dtype), diagonals=True, impl="reference")
        return found.columns, found.diagonals if found.diagonals is not None else found.columns, found.lse

    check = _check(s, lambda o: tuple(x[:1, :g] for x in o), run)
    amount = Work(flops=4.0 * shape.batch * shape.heads * last.shape[2] * shape.n * shape.dim, bytes=2 * _bytes(k), unit="byte")
    return Entry(amount, lambda impl: tuple(estimate.row_sums(last, k, diagonals=True, impl=impl)), check)  # pyright: ignore[reportArgumentType]


def _tiles(shape: Shape, s: Settings, bits: int | None) -> Entry:
    q, k = _tensors(shape, s)
    block_q, block_k = (128, 64) if bits is None else (64, 32)
    g, rows, n = shape.group, shape.rows, shape.n

    def run(x: Tensor, y: Tensor, impl: str) -> Tensor:
        return estimate.tile_maxima(x, y, block_q, block_k, bits=bits, impl=impl)  # pyright: ignore[reportArgumentType]

    amount = Work(flops=shape.batch * shape.heads * n * (n + 1.0) * shape.dim, bytes=_bytes(q, k), unit="FLOP")
    if bits is None:
        check: Check = _check(
            s, lambda o: (o[0][:1, :g, -math.ceil(rows / block_q) :],),
            lambda dtype: (run(q[:1, :g, -rows:].to(dtype), k[:1, :1].to(dtype), "reference"),),
        )  # fmt: skip
        return Entry(amount, lambda impl: run(q, k, impl), check)
    # codes depend on the means over all tokens: a shorter problem is judged, run in the same way
    few = min(PART, n)
    part = q[:1, :g, :few], k[:1, :1, :few]
    check = _check(
        s, lambda o: (run(*part, s.impl),), lambda dtype: (run(part[0].to(dtype), part[1].to(dtype), "reference"),)
    )
    return Entry(amount, lambda impl: run(q, k, impl), check)


def _probabilities(shape: Shape, s: Settings) -> Entry:
    q, k = _tensors(shape, s)
    g, rows, n = shape.group, shape.rows, shape.n

    def run(x: Tensor, y: Tensor, impl: str) -> Tensor:
        return estimate.pooled_probabilities(x, y, 128, 128, impl=impl)  # pyright: ignore[reportArgumentType]

    check = _check(
        s, lambda o: (o[0][:1, :g, -math.ceil(rows / 128) :],),
        lambda dtype: (run(q[:1, :g, -rows:].to(dtype), k[:1, :1].to(dtype), "reference"),),
    )  # fmt: skip
    amount = Work(flops=2 * shape.batch * shape.heads * n * (n + 1.0) * shape.dim, bytes=2 * _bytes(q, k), unit="FLOP")
    return Entry(amount, lambda impl: run(q, k, impl), check)


def _choose(shape: Shape, s: Settings, rule: str) -> Entry:
    tiles = shape.n // 128
    scores = s.normal(shape.batch, shape.heads, tiles, tiles, dtype=torch.float32)
    grid = TileGrid(n_q=shape.n, n_k=shape.n, block_q=128, block_k=128)
    weights = scores.masked_fill(~grid.visible(s.device), -torch.inf).softmax(-1)

    def run(x: Tensor, impl: Any) -> Selection:
        if rule == "top-k":
            return estimate.choose_top_k(x, 0.1, grid, sinks=1, local=1, impl=impl)
        if rule == "top-p":
            return estimate.choose_top_p(x, 0.9, grid, sinks=1, local=1, impl=impl)
        return estimate.choose_threshold(x, 1.3, grid, sinks=1, local=1, impl=impl)

    given = weights if rule == "top-p" else scores

    def exact() -> tuple[Tensor, Tensor]:
        found = run(given[:1, :1], "reference")
        return found.starts, found.start_counts

    amount = Work(flops=None, bytes=_bytes(given), unit="byte")
    return Entry(
        amount, lambda impl: run(given, impl), EqualCheck(slices=lambda o: tuple(x[:1, :1] for x in o), exact=exact),
        outputs=lambda raw: (raw.starts, raw.start_counts),
    )  # fmt: skip


FUNCTIONS: dict[str, Callable[[Shape, Settings], Entry]] = {
    "pooled scores": _pooled_scores,
    "choose top-k": partial(_choose, rule="top-k"),
    "choose top-p": partial(_choose, rule="top-p"),
    "choose threshold": partial(_choose, rule="threshold"),
    "min-max pages": partial(_keys_only, what="min-max pages"),
    "page bounds": _page_bounds,
    "extend pages": _extend_pages,
    "pool blocks": partial(_keys_only, what="pool blocks"),
    "block statistics": partial(_keys_only, what="block statistics"),
    "row sums": _row_sums,
    "tile maxima 4 bits": partial(_tiles, bits=4),
    "tile maxima 8 bits": partial(_tiles, bits=8),
    "tile maxima": partial(_tiles, bits=None),
    "pooled probabilities": _probabilities,
    "descend tree": descend_tree,
    **STEP,
}


def _build(what: str, shape: Shape, s: Settings) -> Field:
    entry = FUNCTIONS[what](shape, s)
    ours = Contestant(
        name="saccade", role="ours", work=entry.work,
        make=lambda: Run(call=lambda: entry.call(s.impl), outputs=entry.outputs, impl=lambda: last_estimate().impl),
    )  # fmt: skip
    if what in STEP:
        return Field(contestants=[ours, dense_step(shape, s)], check=entry.check)
    q, k = _tensors(shape, s)
    pairs = shape.batch * shape.heads * shape.n * (shape.n + 1) / 2
    dense = Work(flops=4 * shape.dim * pairs, bytes=2 * _bytes(q, k), unit="FLOP")
    others = [replace(c, shared=f"prompt {shape}") for c in peers.dense(peers.Inputs(q, k, k), dense, checked=False)[:1]]
    return Field(contestants=[ours, *others], check=entry.check)


def case(what: str, shape: Shape, size: int = 2) -> Case:
    if what not in FUNCTIONS:
        raise ValueError(f"{what!r} is no function of estimate: choose one of {', '.join(FUNCTIONS)}")
    if shape.n % 128:
        raise ValueError(f"estimates are timed over whole tiles: {shape.n} tokens are no multiple of 128")
    tokens = (BATCH if what in STEP else shape.batch) * (shape.heads + shape.kv_heads) * shape.n * shape.dim
    return Case(
        family=what, shape=vars(shape).copy(), need=6.0 * tokens * size + 24.0 * shape.heads * (shape.n / 64) ** 2,
        build=partial(_build, what, shape),
    )  # fmt: skip


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        shapes = [Shape(512, 4, 2, 32)] if grid == "quick" else [Shape(n, 8, 2, 64) for n in (2048, 4096)]
        return [case(what, shape, 4) for shape in shapes for what in FUNCTIONS]
    if grid == "quick":
        long = ("pooled scores", "choose top-k", "min-max pages", "page bounds", "row sums", "descend tree", *STEP)
        return [*(case(what, Shape(32768)) for what in FUNCTIONS), *(case(what, Shape(131072)) for what in long)]
    return [case(what, Shape(n)) for n in (32768, 131072, 8192) for what in FUNCTIONS]
