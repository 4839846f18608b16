"""Neighbourhood attention in a decoder: one axis, causal, as a prefill method runs it."""

from __future__ import annotations

from torch import Tensor

from saccade.core import LayerContext, Selection
from saccade.parts.static.causal import causal_attention, causal_lists, exact_rows


def select_rows(q: Tensor, k: Tensor, *, window: int, stride: int, dilation: int) -> Selection:
    """The pattern as one Selection in the order of the tokens: tiles where rows share their windows, else row by row."""
    n_q, n_k = q.shape[2], k.shape[2]
    if dilation == 1 and stride > 1:
        lists = causal_lists(n_q, n_k, window, stride, None, str(q.device))
        if lists.row_bits is None and not lists.pad:
            return lists.selection
    return exact_rows(n_q, n_k, window, stride, dilation, q.device)


def attend_rows(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, *, window: int, stride: int, dilation: int) -> Tensor:
    """Attention over the pattern, tile by tile with the exact mask inside tiles."""
    n_k = k.shape[2]
    if q.shape[2] == 1 or (window >= n_k and dilation == 1):
        return ctx.attend(q, k, v, None)
    if ctx.softcap is not None:
        # a cap would lift masked logits, so nothing may be masked inside tiles
        return ctx.attend(q, k, v, select_rows(q, k, window=window, stride=stride, dilation=dilation))
    return causal_attention(q, k, v, ctx.attend, window=window, stride=stride, dilation=dilation)


def check_sizes(slug: str, **sizes: object) -> None:
    """ValueError unless every size is a whole number of at least 1."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{slug}({name}={value!r}) is not a whole number of at least 1")
