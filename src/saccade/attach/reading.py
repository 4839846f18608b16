"""Full attention over what a layer holds: its sealed segments one by one, and the tail."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.cache import KVLayer, Segment
from saccade.cache.segment import attend_rectangle
from saccade.core import LayerContext, Partial
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
