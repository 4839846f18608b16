"""Cases of `estimate` for what a decoding step chooses with, next to the dense step that it is to save, and for the descent of a tree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.bench.case import Check, Contestant, Run, Settings, Work
from saccade.bench.exact import EqualCheck, SliceCheck
from saccade.ops import decode, estimate, last_run
from saccade.ops.quant import affine_quantise, pack

if TYPE_CHECKING:
    from saccade.bench.estimate_cases import Shape

BATCH = 8  # sequences of a decoding step
SHARE = 16  # every so many-th token is read
LABELS, BITS = 8, 4  # channels and bits of a packed label
TREE = {"keep": 256, "first": 16, "block": 2}  # of a descent: units kept, keys left out at the start, keys a unit
TILE, EVERY, WINDOW = 64, 2, 256  # queries a tile, of which every second scores; newest keys left out
SCORED = 64  # rows whose choice is judged


@dataclass(frozen=True)
class Entry:
    """One function on given tensors. call takes the impl. exact: its outputs on a slice, by the reference, in a dtype. slices: the
    same part of the outputs."""

    work: Work
    call: Callable[[str], Any]
    check: Check
    outputs: Callable[[Any], tuple[Tensor, ...]] = lambda raw: raw if isinstance(raw, tuple) else (raw,)


def best_tokens(shape: Shape, s: Settings) -> Entry:
    """A row of scores for each key head, as where a group chooses together."""
    rows, count = BATCH * shape.kv_heads, shape.n // SHARE
    scores = s.normal(rows, shape.n, dtype=torch.float32)
    amount = Work(flops=None, bytes=4.0 * rows * shape.n + 8.0 * rows * count, unit="byte")
    check = EqualCheck(slices=lambda o: (o[0][:SCORED],), exact=lambda: (estimate.best_ids(scores[:SCORED], count, impl="reference"),))
    return Entry(amount, lambda impl: estimate.best_ids(scores, count, impl=impl), check)  # pyright: ignore[reportArgumentType]


def row_products(shape: Shape, s: Settings) -> Entry:
    """Products with an eighth of the channels of every key, the largest of a group written."""
    width = max(1, shape.dim // 8)
    q = s.normal(BATCH, shape.heads, width, dtype=torch.float32)
    rows = s.normal(BATCH, shape.kv_heads, shape.n, width)

    def run(x: Tensor, y: Tensor, impl: Any) -> Tensor:
        return estimate.row_products(x, y, reduce="group_max", impl=impl)

    part = q[:1, : shape.group], rows[:1, :1, : min(4096, shape.n)]
    check = SliceCheck(
        slices=lambda o: (o[0][:1, :1, : part[1].shape[2]],), exact=lambda: (run(part[0].double(), part[1].double(), "reference"),),
        plain=lambda: (run(*part, "reference"),), dtype=s.dtype,
    )  # fmt: skip
    return Entry(_read(shape, rows), lambda impl: run(q, rows, impl), check)


def packed_products(shape: Shape, s: Settings) -> Entry:
    """Products with labels of a few channels in 4 bits, the largest of a group written."""
    q = s.normal(BATCH, shape.heads, LABELS)
    codes, step, lowest = affine_quantise(s.normal(BATCH, shape.kv_heads, shape.n, LABELS), BITS)
    packed, ranges = pack(codes, BITS, check=False), torch.cat([step, lowest], dim=-1)

    def run(x: Tensor, y: Tensor, z: Tensor, impl: Any) -> Tensor:
        return estimate.packed_products(x, y, z, BITS, LABELS, reduce="group_max", impl=impl)

    few = min(4096, shape.n)
    part = q[:1, : shape.group], packed[:1, :1, :few], ranges[:1, :1, :few]
    check = SliceCheck(
        slices=lambda o: (o[0][:1, :1, :few],), exact=lambda: (run(part[0].double(), part[1], part[2].double(), "reference"),),
        plain=lambda: (run(*part, "reference"),), dtype=s.dtype,
    )  # fmt: skip
    return Entry(_read(shape, packed, ranges), lambda impl: run(q, packed, ranges, impl), check)


def descend_tree(shape: Shape, s: Settings) -> Entry:
    """hip's search at its defaults: 32 of 64 rows a tile, 512 keys in pairs."""
    generator = s.generator()
    # whole numbers: products are exact, so that ids can be compared
    q, k = (
        torch.randint(-3, 4, (1, h, shape.n, shape.dim), generator=generator, device=s.device).to(s.dtype)
        for h in (shape.heads, shape.kv_heads)
    )
    rows = q.unflatten(2, (-1, TILE))[:, :, :, ::EVERY]
    ends = torch.arange(1, shape.n // TILE + 1) * TILE
    sizes = ((ends - TILE - WINDOW + 1 - TREE["first"]) // TREE["block"]).clamp(min=0)
    keep = min(TREE["keep"], max(1, int(sizes[-1])))

    def run(x: Tensor, y: Tensor, impl: Any) -> Tensor:
        return estimate.descend_tree(x, y, sizes, keep, first=TREE["first"], block=TREE["block"], impl=impl)

    rounds = (sizes.clamp(min=1).double() / keep).ceil().log2().ceil().sum().item() * shape.heads
    scored = rounds * 2 * keep * TREE["block"] * shape.dim
    amount = Work(flops=2.0 * scored * TILE / EVERY, bytes=scored * s.size, unit="byte")
    check = EqualCheck(
        slices=lambda o: (o[0][:, : shape.group],),
        exact=lambda: (run(rows[:, : shape.group].float(), k[:, :1].float(), "reference"),),
    )  # fmt: skip
    return Entry(amount, lambda impl: run(rows, k, impl), check)


def _read(shape: Shape, *stored: Tensor) -> Work:
    """What is stored, read once, and a score for every token and key head."""
    return Work(flops=None, bytes=sum(x.numel() * x.element_size() for x in stored) + 4.0 * BATCH * shape.kv_heads * shape.n, unit="byte")


def dense_step(shape: Shape, s: Settings) -> Contestant:
    """One query over all keys and values."""
    generator = s.generator()
    q = s.normal(BATCH, shape.heads, 1, shape.dim, generator=generator)
    k, v = (s.normal(BATCH, shape.kv_heads, shape.n, shape.dim, generator=generator) for _ in range(2))
    amount = Work(flops=4.0 * BATCH * shape.heads * shape.n * shape.dim, bytes=float(2 * k.numel() * s.size), unit="byte")
    return Contestant(
        name="saccade dense step", role="dense", work=amount, checked=False, shared=f"step {shape}",
        make=lambda: Run(call=lambda: decode(q, k, v), impl=lambda: last_run().impl),
    )  # fmt: skip


STEP: dict[str, Callable[[Shape, Settings], Entry]] = {
    "best tokens": best_tokens, "row products": row_products, "packed products": packed_products,
}  # fmt: skip
