"""AnchorAttention: a row's highest logit lies almost always among its first and its local keys; what comes near it is read too.

    m_i    = max_j scale * q_i.k_j                over the first `initial` blocks and the local keys of row i, attended with (m, l, acc)
    S_g    = {j : scale * mean(q block).k_j + theta >= mean(m of the block), for some block of the group g}
    out_i  = attention over first + local + S_g   by resuming the softmax of the first two over the keys of S_g

A group is `step` blocks of queries; its local keys begin `local` blocks before it, so that first, S_g and local keys partition the
past. S_g are single keys (stripes), found without sorting. Rows after the last whole group, and single queries, are dense.

Source: anchorattention, arXiv 2505.23520, section 3. The ranges are a disjoint cover of the past, as the paper describes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Partial, Prefill, Selection, merge, register
from saccade.parts.anchor import AnchorGrid, row_maxima, within


@register
@dataclass(frozen=True, kw_only=True)
class AnchorAttention(Prefill):
    """Keys are chosen for each query head and group.

    theta: how far below the anchor a key's logit may lie, natural-log units (logits are scaled); inf reads everything, -inf only the
    first and local keys. It is absolute: models with other logit ranges need another one. block: tokens of a block. step: blocks of
    queries in a group. initial: first blocks that every row reads. local: blocks before the group that its rows read. tail: last rows
    that are dense at least, besides what is left after whole groups (0 in the paper): a mean query blurs what single rows at the end of
    a prompt look for.
    """

    theta: float = 12.0
    block: int = 128
    step: int = 16
    initial: int = 1
    local: int = 1
    tail: int = 0

    info = Info(
        slug="anchorattention", phase="prefill", opened={"theta": torch.inf},
        tiny={"theta": -torch.inf, "block": 4, "step": 2, "initial": 1, "local": 1},
        opts_out={
            "chunked": "groups are counted from the first query given, and the rows after the last whole group are dense",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "keys are chosen for a whole group of rows by the mean of its queries; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.theta, bool) or not isinstance(self.theta, int | float) or self.theta != self.theta:
            raise ValueError(f"anchorattention(theta={self.theta!r}) is not a difference of logits: give a number, inf included")
        for name, least in (("block", 1), ("step", 1), ("initial", 0), ("local", 0), ("tail", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"anchorattention({name}={value!r}) is not a whole number of at least {least}")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        grid = self._grid(q, k)
        return grid.reading(self._stripes(ctx, q, k, grid))

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grid = self._grid(q, k)
        if not grid.groups:
            return ctx.attend(q, k, v, None)
        if q.device.type == "cpu":
            # torch's fused CPU kernel keeps its (m, l) to itself: one softmax over both ranges is cheaper there than a merge
            return ctx.attend(q, k, v, self.select(ctx, q, k, v))
        return self.resumed(ctx, q, k, v).out

    def resumed(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Partial:
        """The two passes: first and local keys with their softmax state, which goes on over the stripes."""
        grid = self._grid(q, k)
        state = ctx.partial(q, k, v, grid.anchors(q.device))
        listed = self._stripes(ctx, q, k, grid)
        return merge(state, ctx.partial(q, k, v, grid.stripes(listed))) if listed.shape[-1] else state

    def _grid(self, q: Tensor, k: Tensor) -> AnchorGrid:
        return AnchorGrid(
            n_q=q.shape[2], n_k=k.shape[2], block=self.block, step=self.step, initial=self.initial, local=self.local,
            tail=self.tail,
        )  # fmt: skip

    def _stripes(self, ctx: LayerContext, q: Tensor, k: Tensor, grid: AnchorGrid) -> Tensor:
        """Ascending ids int32 `(B, Hq, groups, m)`."""
        if self.theta == -torch.inf or not grid.groups:
            return torch.empty(1, 1, grid.groups, 0, dtype=torch.int32, device=q.device)
        maxima = row_maxima(q, k, grid, scale=ctx.scale, softcap=ctx.softcap)
        return within(q, k, maxima, grid, self.theta, scale=ctx.scale, softcap=ctx.softcap)
