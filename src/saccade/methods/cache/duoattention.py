"""DuoAttention: learned gates say which heads need the whole context; the others read the first tokens and the newest ones.

Offline (`saccade.train.gates`), every key/value head gets a gate a in [0, 1] that mixes its two ways of attending,

    out = a full_attention + (1 - a) streaming_attention,

and the gates alone are trained, so that the last hidden states stay as they are on answers that stand far back, under a penalty on |a|.
Heads whose gate is among the highest `share` of the model are retrieval heads. Both phases and the cache are split accordingly
(`methods/split_heads.py`): retrieval heads are dense and keep everything, streaming heads read and hold sinks and recent tokens.

Source: duoattention, arXiv 2410.10819, sections 2 and 3. Chosen here: the window moves in blocks, as the released prefill kernel does, so
that a query sees `recent` to `recent + block` tokens; equal gates are told apart by layer and head instead of by noise.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, register
from saccade.methods.split_heads import SplitHeads


@register
@dataclass(frozen=True, kw_only=True)
class DuoAttention(SplitHeads):
    """share: retrieval heads among all key/value heads, rounded up, in [0, 1] (the paper: 0.25 with as many key/value heads as query
    heads, 0.5 with fewer). sinks, recent: tokens that streaming heads keep, rounded up to blocks. block: tokens that are dropped together.

    Needs a plan with gates: `saccade.train.gates.train_gates`.
    """

    share: float = 0.5
    sinks: int = 64
    recent: int = 256
    block: int = 64

    info = Info(
        slug="duoattention", phase="cache", also=frozenset({"prefill", "decode"}), needs=frozenset({"calibration", "training"}),
        frees_memory=True, append_only=False, ragged=True, opened={"share": 1.0}, tiny={"sinks": 4, "recent": 16, "block": 4},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share <= 1:
            raise ValueError(f"duoattention(share={self.share!r}) is not a share of the heads: give a number from 0 to 1")
        for name, least in (("sinks", 0), ("recent", 1), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"duoattention({name}={value!r}) is not a whole number of at least {least}")

    def full_heads(self, ctx: LayerContext) -> Tensor:
        return ctx.found("place") < self.share
