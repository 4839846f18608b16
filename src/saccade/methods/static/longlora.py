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

from dataclasses import dataclass

from saccade.core import Info, register
from saccade.parts.static.groups import IN_PARTS, GroupedPrefill


@register
@dataclass(frozen=True, kw_only=True)
class LongLoRA(GroupedPrefill):
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
        opts_out=IN_PARTS,
    )  # fmt: skip
