"""LongLoRA: fine-tune for a longer context with attention inside groups, half of the heads shifted by half a group.

S2-Attn with g tokens a group (g = n / 4) and heads h = 0 ... H - 1:

    h < H / 2:   query i reads key j <= i  iff  floor(i / g) = floor(j / g)
    h >= H / 2:  the same with borders g/2, 3g/2, 5g/2, ...; the last group also reads the first g/2 tokens (`wrapped`: what a roll by
                 g/2 gives once its mask follows true positions; without it the last group stays by itself)

so that information crosses group borders in every layer at the cost n g. It is a pattern to train with: attach it while fine-tuning
(`saccade train extend`, with low-rank adapters on q, k, v, o and trainable embeddings and norms), and leave it off afterwards. The tuned
model attends densely, and all keys stay in its cache.

Source: longlora, arXiv 2309.12307, section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from saccade.core import HeadLayout, Info, LayerContext, Prefill, Selection, register
from saccade.parts.static import Pattern
from saccade.parts.static.decoder import check_sizes
from saccade.parts.static.groups import Groups


@register
@dataclass(frozen=True, kw_only=True)
class LongLoRA(Prefill):
    """groups: how many a sequence is cut into, g = ceil(n / groups). group: g in tokens, instead (the paper's 8192 for instructions of
    any length). shifted: share of the query heads, the last ones, whose groups are shifted; 0 gives block-diagonal attention.
    wrapped: whether the last shifted group reads the first half group too.
    """

    groups: int = 4
    group: int | None = None
    shifted: float = 0.5
    wrapped: bool = True

    info = Info(
        slug="longlora", phase="prefill", needs=frozenset({"training"}), opened={"groups": 1}, tiny={"groups": 4},
        opts_out={
            "chunked": "a group is a share of the whole sequence, of which a chunk knows what has come so far",
            "stepwise": "single tokens are decoded densely, as the tuned model attends; groups are for training on whole sequences",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_groups("longlora", self.groups, self.group, self.shifted)

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
        return Groups(size, round(self.shifted * layout.query_heads), wrapped=self.wrapped)


def check_groups(slug: str, groups: int, group: int | None, shifted: float) -> None:
    """ValueError for what can't be a number of groups, the size of a group, or a share of heads."""
    check_sizes(slug, groups=groups, group=1 if group is None else group)
    if isinstance(shifted, bool) or not isinstance(shifted, int | float) or not 0 <= shifted <= 1:
        raise ValueError(f"{slug}(shifted={shifted!r}) is not a share of heads between 0 and 1")
