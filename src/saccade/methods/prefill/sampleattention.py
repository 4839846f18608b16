"""SampleAttention: a few percent of the query rows, computed exactly, tell which key columns matter; those and a local band are read.

    c_j = sum over sampled rows i of softmax(q_i k^T * scale)_j        rows at a constant distance, the last one always among them
    I   = the fewest columns with sum_{j in I} c_j >= alpha * sum_j c_j
    query i reads key j <= i  iff  i - j < ceil(window_share * N)  or  j in I

Columns inside the band are read through the band: one softmax over both. Decoding is dense.

Source: sampleattention, arXiv 2406.15486, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, Mass, Prefill, Selection, register
from saccade.ops.estimate import row_sums
from saccade.parts.choose import choose
from saccade.parts.lists import tile_ends
from saccade.parts.patterns import band_and_columns
from saccade.parts.probe import strided_rows
from saccade.parts.sizes import resolve


@register
@dataclass(frozen=True, kw_only=True)
class SampleAttention(Prefill):
    """Columns are chosen for each query head.

    alpha: share of the sampled attention that the columns must hold, in (0, 1]; it is a mean over the sampled rows, single rows may
    retain less. row_share: share of the query rows that are sampled, in (0, 1]. window_share: width of the local band as a share of
    the prompt, in (0, 1]. block: queries and keys per tile, tokens; all rows of a tile read what any of them needs of the band.
    """

    alpha: float = 0.95
    row_share: float = 0.05
    window_share: float = 0.08
    block: int = 64

    info = Info(
        slug="sampleattention", phase="prefill", opened={"alpha": 1.0},
        tiny={"alpha": 0.5, "row_share": 0.2, "window_share": 0.1, "block": 16},
        opts_out={
            "chunked": "every chunk of a prompt samples its own rows, and its band is a share of the keys so far",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "columns are chosen for all rows by rows from the whole prompt; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("alpha", "row_share", "window_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"sampleattention({name}={value!r}) is not a share above 0 and at most 1")
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"sampleattention(block={self.block!r}) is not a whole number of at least 1")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        rows = strided_rows(n_q, self.row_share, q.device)
        mass = row_sums(q[:, :, rows], k, rows + n_k - n_q, scale=ctx.scale, softcap=ctx.softcap).columns
        columns = choose(mass, Mass(self.alpha))
        width = resolve(float(self.window_share), n_k)
        lists = band_and_columns(columns, width, tile_ends(n_q, n_k, self.block, q.device), self.block)
        return lists.selection(n_q=n_q, n_k=n_k, block=self.block)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self.alpha == 1 or self.window_share == 1:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))
