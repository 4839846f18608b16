"""GNA: neighbourhood attention with a stride: groups of queries share one window, so that sparsity falls on whole tiles.

On a grid, in one to three dimensions, it is `saccade.methods.static.neighborhood.neighborhood_attention`. In a decoder the axis is
the sequence: with window w and stride s, query i belongs to the group whose last position is c and reads

    c = floor(i / s) * s + s - 1,   keys max(c - w + 1, 0) ... i

With dilation D only positions of the same residue mod D meet, and i counts within the residue. s = 1 is a sliding window (fna),
s = w blocked attention. A stride that the tiles divide needs no mask inside tiles. Where the sequence ends is unknown to a decoder,
so an unfinished group keeps the leader it will have (on a grid its leader is the last token).

Source: gna, arXiv 2504.16922, sections 3.1 and 3.2. Decoding is dense.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register
from saccade.parts.static.decoder import attend_rows, check_sizes, select_rows


@register
@dataclass(frozen=True, kw_only=True)
class GNA(Prefill):
    """window: keys a group of queries shares, tokens; the last query of a group reads all of them. stride: queries in a group,
    1 ... window. dilation: distance of neighbouring positions. The paper's values are for grids: these are for text."""

    window: int = 1024
    stride: int = 128
    dilation: int = 1

    info = Info(
        slug="gna", phase="prefill", opened={"window": 1 << 30, "dilation": 1}, tiny={"window": 32, "stride": 16},
        opts_out={
            "chunked": "the last few tokens of a prompt in chunks count as decoding, which is dense; longer chunks give the same",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("gna", window=self.window, stride=self.stride, dilation=self.dilation)
        if self.stride > self.window:
            raise ValueError(f"gna(window={self.window}, stride={self.stride}): a stride above the window leaves queries without keys")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return select_rows(q, k, window=self.window, stride=self.stride, dilation=self.dilation)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_rows(ctx, q, k, v, window=self.window, stride=self.stride, dilation=self.dilation)
