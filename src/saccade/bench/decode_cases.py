"""Cases of `decode`: one query against a long cache, dense, in pages and in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.bench import peers
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Work
from saccade.bench.exact import AttentionCheck, Source
from saccade.bench.patterns import cache_pages
from saccade.core import HeadLayout, Selection
from saccade.ops import decode, estimate, last_run
from saccade.ops.decode import Packed, decode_quantised

PAGE = 16
SELECTED = 1024


@dataclass(frozen=True)
class Shape:
    n: int
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128


def work(shape: Shape, keys: float, bytes_: float) -> Work:
    """4 D operations for each query head and key; `bytes_` of keys and values read."""
    return Work(flops=4.0 * shape.dim * shape.batch * shape.heads * keys, bytes=bytes_, unit="byte")


def _inputs(shape: Shape, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    generator = s.generator()
    q = s.normal(shape.batch, shape.heads, 1, shape.dim, generator=generator)
    k, v = (s.normal(shape.batch, shape.kv_heads, shape.n, shape.dim, generator=generator) for _ in range(2))
    return q, k, v


def _whole(shape: Shape, size: int) -> float:
    return 2.0 * shape.batch * shape.kv_heads * shape.n * shape.dim * size


def _torch(q: Tensor, k: Tensor, v: Tensor, amount: Work, checked: bool) -> list[Contestant]:
    """torch's kernels: the queries of a group become rows over their key/value head, so that nothing is repeated."""
    rows = HeadLayout.of(q, k, v).to_groups(q.squeeze(2))
    found = []
    for one in peers.dense(peers.Inputs(rows, k, v, causal=False), amount, checked=checked):
        if one.name in ("SageAttention", "flash-attn"):
            continue
        found.append(replace(one, make=partial(_as_heads, one.make)))
    if q.is_cuda and peers.library("flash_attn")[0] is not None:
        found.append(Contestant(name="flash-attn", role="dense", work=amount, make=partial(_flash, q, k, v), checked=checked))
    return found


def _as_heads(make: Callable[[], Run]) -> Run:
    return replace(make(), outputs=lambda raw: (raw.flatten(1, 2).unsqueeze(2),))


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Run:
    module, _ = peers.library("flash_attn")
    rows, keys, values = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return Run(
        call=lambda: module.flash_attn_with_kvcache(rows, keys, values), outputs=lambda raw: (raw.transpose(1, 2),), impl="flash_attn"
    )


def _ours(s: Settings, q: Tensor, k: Tensor, v: Tensor, selection: Selection | None) -> Run:
    impl: Any = s.impl
    return Run(call=lambda: decode(q, k, v, selection, impl=impl).out, impl=lambda: last_run().impl)


def _dense(shape: Shape, s: Settings) -> Field:
    q, k, v = _inputs(shape, s)
    amount = work(shape, shape.n, _whole(shape, s.size))
    ours = Contestant(name="saccade", role="ours", work=amount, make=lambda: _ours(s, q, k, v, None))
    return Field(
        contestants=[ours, *_torch(q, k, v, amount, True)], check=AttentionCheck.of(q, k, v, causal=False), density=1.0
    )


def _paged(shape: Shape, selected: int, scored: bool, s: Settings) -> Field:
    q, k, v = _inputs(shape, s)
    select: Callable[[], Selection] | None = None
    if scored:
        grid = estimate.TileGrid(n_q=1, n_k=shape.n, block_q=1, block_k=PAGE)
        low, high = estimate.minmax_pages(k, PAGE)

        def choose() -> Selection:
            bounds = estimate.page_bounds(q, low, high)
            by_group = bounds.unflatten(1, (shape.kv_heads, -1)).amax(2)
            return estimate.choose_top_k(by_group, selected // PAGE, grid)

        selection, select = choose(), choose
    else:
        selection = cache_pages(shape.n, selected, shape.batch, shape.kv_heads, PAGE, s.device)
    whole = work(shape, shape.n, _whole(shape, s.size))
    amount = work(shape, selected, _whole(shape, s.size) * selected / shape.n)
    contestants = [
        Contestant(name="saccade", role="ours", work=amount, make=lambda: _ours(s, q, k, v, selection), select=select),
        Contestant(name="saccade dense", role="dense", work=whole, make=lambda: _ours(s, q, k, v, None), checked=False),
        *_torch(q, k, v, whole, False),
    ]
    return Field(contestants=contestants, check=AttentionCheck.of(q, k, v, selection=selection, causal=False), density=selection.density())


def packed_by_row(x: Tensor, bits: int, granularity: Any, group: int) -> Packed:
    """Packed.of one batch row after another: the quantiser's float32 copies are those of a row."""
    rows = [Packed.of(x[b : b + 1], bits, granularity=granularity, group=group) for b in range(x.shape[0])]

    def joined(name: str) -> Tensor | None:
        return None if getattr(rows[0], name) is None else torch.cat([getattr(row, name) for row in rows])

    return replace(rows[0], codes=torch.cat([row.codes for row in rows]), scale=joined("scale"), zero=joined("zero"))


def _one_head(x: Packed, batch: int, head: int, dtype: torch.dtype) -> Tensor:
    def cut(y: Tensor | None) -> Tensor | None:
        return None if y is None else y[batch : batch + 1, head : head + 1]

    codes = x.codes[batch : batch + 1, head : head + 1]
    return replace(x, codes=codes, scale=cut(x.scale), zero=cut(x.zero)).read(dtype=torch.float64)[0, 0].to(dtype)


def _quantised(shape: Shape, bits: int, s: Settings) -> Field:
    q, k, v = _inputs(shape, s)
    keys, values = packed_by_row(k, bits, "channel", 128), packed_by_row(v, bits, "token", shape.dim)
    held = float(keys.nbytes + values.nbytes)
    whole = work(shape, shape.n, _whole(shape, s.size))
    source: Source = lambda b, h, dtype: (_one_head(keys, b, h, dtype), _one_head(values, b, h, dtype))  # noqa: E731

    def ours() -> Run:
        return Run(call=lambda: decode_quantised(q, keys, values, impl=s.impl).out, impl=lambda: last_run().impl)

    contestants = [
        Contestant(name="saccade", role="ours", work=work(shape, shape.n, held), make=ours),
        Contestant(name="saccade dense", role="dense", work=whole, make=lambda: _ours(s, q, k, v, None), checked=False),
        *_torch(q, k, v, whole, False),
    ]
    check = AttentionCheck(q, source, kv_heads=shape.kv_heads, causal=False)
    return Field(contestants=contestants, check=check, density=1.0, note=f"{8 * held / (2 * k.numel()):.2f} bits a number")


def dense_case(shape: Shape, size: int = 2) -> Case:
    return Case(family="dense", shape=vars(shape).copy(), need=1.2 * _whole(shape, size), build=partial(_dense, shape))


def paged_case(shape: Shape, selected: int = SELECTED, scored: bool = False, size: int = 2) -> Case:
    return Case(
        family="pages by bound" if scored else "pages", shape={**vars(shape), "selected": selected, "page": PAGE},
        need=(1.6 if scored else 1.2) * _whole(shape, size), build=partial(_paged, shape, selected, scored),
    )  # fmt: skip


def quantised_case(shape: Shape, bits: int = 4, size: int = 2) -> Case:
    one_row = 20 * shape.kv_heads * shape.n * shape.dim
    return Case(
        family=f"{bits} bits", shape=vars(shape).copy(), need=1.8 * _whole(shape, size) + one_row, build=partial(_quantised, shape, bits)
    )


def cases(grid: str, cuda: bool) -> list[Case]:
    """Most telling first: what the time does not allow is left out at the end."""
    if not cuda:
        tiny = [Shape(n, batch=b, heads=4, kv_heads=2, dim=32) for b in (1, 2) for n in (1024, 4096)]
        larger = [Shape(n, batch=1, heads=8, kv_heads=8, dim=64) for n in (8192, 16384, 32768)]
        chosen, selected = (tiny, 128) if grid == "quick" else (larger, SELECTED)
        return [
            *(dense_case(x, 4) for x in chosen), *(paged_case(x, selected, size=4) for x in chosen),
            *(paged_case(x, selected, True, size=4) for x in chosen[-1:]), *(quantised_case(x, size=4) for x in chosen[-1:]),
        ]  # fmt: skip
    if grid == "quick":
        return [
            dense_case(Shape(32768)), paged_case(Shape(131072)), paged_case(Shape(131072), scored=True), quantised_case(Shape(32768)),
            dense_case(Shape(131072)), dense_case(Shape(32768, batch=1)), paged_case(Shape(32768)), quantised_case(Shape(131072)),
        ]  # fmt: skip
    if grid == "bars":
        return [
            dense_case(Shape(32768)), dense_case(Shape(131072, batch=16)), quantised_case(Shape(131072, batch=16)),
            paged_case(Shape(131072)), paged_case(Shape(131072), scored=True),
        ]  # fmt: skip
    shapes = [Shape(n, batch=b) for b in (8, 16, 1) for n in (32768, 131072)]
    return [
        *(dense_case(x) for x in shapes), *(paged_case(x) for x in shapes), *(paged_case(x, scored=True) for x in shapes),
        *(quantised_case(x) for x in shapes), *(quantised_case(x, bits) for bits in (2, 3, 8) for x in shapes[:1]),
        *(paged_case(Shape(131072), k) for k in (4096, 16384, 65536)),
        *(dense_case(Shape(n)) for n in (8192, 16384, 65536)),
        *(dense_case(Shape(32768, kv_heads=h)) for h in (32, 4)), *(dense_case(Shape(32768, dim=d)) for d in (64, 256)),
    ]  # fmt: skip


