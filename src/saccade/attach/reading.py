"""Attention over what a layer holds: in full, its sealed segments one by one and the tail; or what a decode method chose of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saccade.attach.stats import computed_pairs
from saccade.cache import KVLayer, Segment
from saccade.cache.mixed import MixedEntries
from saccade.cache.segment import attend_rectangle
from saccade.core import LayerContext, Partial, Selection
from saccade.ops import attend, decode
from saccade.parts.merging import LOG_WEIGHT


def by_row(segments: list[Segment], rows: int) -> list[Segment]:
    """Encoded segments of all rows as one for each row: rows are run one by one from now on."""
    split: list[Segment] = []
    for segment in segments:
        if segment.row is not None or not segment.encoded:
            split.append(segment)
            continue
        for row in range(rows):
            part = segment.take_rows(torch.tensor([row]))
            part.row = row
            split.append(part)
    return split


def reading_encoded(ctx: LayerContext, entries: MixedEntries) -> LayerContext:
    """The context of one decoding step over entries of which some lie encoded: attention over all of them reads what is selected."""
    keys, _ = entries.shapes

    def partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        if k is not keys:
            return ctx.partial(q, k, v, selection, **options)
        if options.keys() - {"return_lse"}:
            raise ValueError(f"attention over encoded entries takes a selection and no {', '.join(options)}: leave the cache method out")
        ctx.count(computed_pairs(1, entries.n, selection, {}))
        return entries.attend(q, selection, scale=ctx.scale, softcap=ctx.softcap)

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return partial(q, k, v, selection, **options).out

    return replace(ctx, partial=partial, attend=run, entries=entries)


def beside(ctx: LayerContext, join: Callable[[Tensor, Partial], Tensor]) -> LayerContext:
    """The context of a step whose attention is joined, by `join(q, partial)`, with that over entries the method knows nothing of."""

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return join(q, ctx.partial(q, k, v, selection, **{**options, "return_lse": True}))

    def refuse(*_: Any, **__: Any) -> Partial:
        raise ValueError("a step that is recorded attends once, through ctx.attend: set Info.recordable only for methods that do")

    return replace(ctx, attend=run, partial=refuse, recorded=True)


def tail_weights(layer: KVLayer, row: int | None) -> Tensor | None:
    """What is added to the logits of the tail's entries, `(B, H, n)`, of one row or of all; None where no entry has a weight."""
    assert layer.tail is not None
    if LOG_WEIGHT not in layer.tail.side:
        return None
    found = (layer.tail if row is None else layer.tail_row(row)).side[LOG_WEIGHT]
    return found if bool(found.any()) else None


def read_segment(segment: Segment, q: Tensor, row: int | None, ctx: LayerContext) -> Partial:
    return segment.attend_row(q, row, scale=ctx.scale, softcap=ctx.softcap)


def read_tail(
    ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None = None, *, return_lse: bool
) -> Partial:
    """The newest m tokens over the tail: causal among themselves. weights: see `tail_weights`."""
    if weights is not None:
        bias = weights.repeat_interleave(q.shape[1] // weights.shape[1], 1).unsqueeze(2)
        return attend(q, k, v, scale=ctx.scale, softcap=ctx.softcap, bias=bias, return_lse=return_lse)
    if q.shape[2] == 1 and not return_lse:
        return decode(q, k, v, scale=ctx.scale, softcap=ctx.softcap)
    if q.shape[2] == 1:
        return attend_rectangle(q, k, v, scale=ctx.scale, softcap=ctx.softcap)
    return attend(q, k, v, scale=ctx.scale, softcap=ctx.softcap, return_lse=return_lse)
