"""SinkLoRA: LongLoRA's groups with fewer shifted heads, and first tokens that every query reads.

With g tokens a group (g = n / 4), query i reads key j <= i iff j lies in its own group or j < `sinks`. Of the heads, the first three
quarters keep the borders g, 2g, ...; in the last quarter they lie at g/2, 3g/2, ... (the paper gives half of the shifted heads back to
the plain layout by "segmentation and reassembly"; which half, and exactly how many, it does not say in a usable form). The paper also
lets sink tokens see the whole sequence, which in a causal model can only mean what lies before them. One softmax runs over group and
sinks; a sink inside the query's own group counts once.

Like longlora it is for fine-tuning. The tuned model attends densely; the paper then serves it with an H2O cache: `cache="h2o"`.

Source: sinklora, arXiv 2406.05678, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saccade.core import HeadLayout, Info, LayerContext, Prefill, Selection, register
from saccade.methods.static.longlora import check_groups
from saccade.parts.static import Pattern
from saccade.parts.static.groups import Groups


@register
@dataclass(frozen=True, kw_only=True)
class SinkLoRA(Prefill):
    """groups: how many a sequence is cut into, g = ceil(n / groups). group: g in tokens, instead. shifted: share of the query heads, the
    last ones, whose groups are shifted (inferred, see above). sinks: first tokens that every query reads; 0 with shifted=0.5 is longlora.
    wrapped: whether the last shifted group reads the first half group too.
    """

    groups: int = 4
    group: int | None = None
    shifted: float = 0.25
    sinks: int = 4
    wrapped: bool = True

    info = Info(
        slug="sinklora", phase="prefill", needs=frozenset({"training"}), opened={"groups": 1}, tiny={"groups": 4, "sinks": 2},
        opts_out={
            "chunked": "a group is a share of the whole sequence, of which a chunk knows what has come so far",
            "stepwise": "single tokens are decoded densely, as the tuned model attends; groups are for training on whole sequences",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_groups("sinklora", self.groups, self.group, self.shifted)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"sinklora(sinks={self.sinks!r}) is not a whole number of at least 0")

    def pattern(self, n: int, layout: HeadLayout) -> Pattern:
        """The keys that each head reads in a sequence of n tokens."""
        return self._cut(n, layout).pattern(n, layout)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        layout = HeadLayout.of(q, k, v)
        return self._cut(k.shape[2], layout).select(q.shape[2], k.shape[2], layout, q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1:
            return ctx.attend(q, k, v, None)
        return self._cut(k.shape[2], HeadLayout.of(q, k, v)).attend(q, k, v, ctx.attend)

    def _cut(self, n: int, layout: HeadLayout) -> Groups:
        size = self.group or math.ceil(n / self.groups)
        return Groups(size, round(self.shifted * layout.query_heads), self.sinks, self.wrapped)
