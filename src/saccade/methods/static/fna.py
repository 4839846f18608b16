"""FNA: neighbourhood attention computed tile by tile: a tile of queries meets the box of keys its windows cover, masked inside.

On a grid, in one to three dimensions, forward and backward, it is `neighborhood_attention(stride=1)` in
`saccade.methods.static.neighborhood`. In a decoder the axis is the sequence and every query reads its own window,

    keys i - (w - 1) D, ..., i - D, i

exactly: keys that only some rows of a tile may read are masked inside the product q.k (`parts/static/masked_product.py`).

Source: fna, arXiv 2403.04690, sections 3.2 and 3.3; the semantics are gna's with stride 1. Decoding is dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.parts.static.decoder import attend_rows, check_sizes, select_rows


@register
@dataclass(frozen=True, kw_only=True)
class FNA(Prefill):
    """window: keys each query reads, itself included. dilation: distance of neighbouring positions. The paper's windows (7 an axis)
    are for images: these are for text."""

    window: int = 1024
    dilation: int = 1

    info = Info(
        slug="fna", phase="prefill", opened={"window": 1 << 30, "dilation": 1}, tiny={"window": 24},
        opts_out={
            "chunked": "the last few tokens of a prompt in chunks count as decoding, which is dense; longer chunks give the same",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("fna", window=self.window, dilation=self.dilation)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return select_rows(q, k, window=self.window, stride=1, dilation=self.dilation)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(ctx, q, k, v, window=self.window, stride=1, dilation=self.dilation)
