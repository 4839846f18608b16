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

from dataclasses import dataclass

from saccade.core import Info, register
from saccade.parts.static.groups import IN_PARTS, GroupedPrefill


@register
@dataclass(frozen=True, kw_only=True)
class SinkLoRA(GroupedPrefill):
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
        opts_out=IN_PARTS,
    )  # fmt: skip
