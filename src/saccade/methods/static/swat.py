"""SWAT: train in a sliding window, with sigmoid weights and signed slopes, so that every token of the window passes something on.

For query m, key n and head h, in a window of w tokens (n <= m < n + w), with rotary q and k at their true positions:

    s_mn = (R_m q_m).(R_n k_n) / sqrt(d) + a_h (m - n),      o_m = sum_n sigmoid(s_mn) v_n

Half of the heads have a_h = -2^-k, k = 1 ... H/2, and look at what is recent; the other half +2^-k and look at the older part of the
window. It is an architecture: a model is trained with it from the start, on sequences several windows long, and has to be run with it
ever after: in prompts and single steps alike (`prefill="swat"` fills the decode phase too). `cache="swat"` beside it keeps the last w
tokens, or a few more. There is no denominator, so early rows, which read few keys, have smaller outputs than later ones.

Source: swat, arXiv 2502.18845, section 3. The released layer calls softmax attention with positive slopes at one public version; this
is the operator of the paper, with `weights="softmax"` for its comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Selection, register
from saccade.parts.static import Pattern
from saccade.parts.static import window as window_pattern
from saccade.parts.static.architecture import StaticArchitecture
from saccade.parts.static.banded import banded_attention, chunks
from saccade.parts.static.causal import exact_rows
from saccade.parts.static.decoder import check_sizes


@register
@dataclass(frozen=True, kw_only=True)
class SWAT(StaticArchitecture):
    """window: tokens that a query reads, itself included (w; the paper's ablation has 128, its main table does not say). slopes: of the
    bias a_h (m - n): "balanced" as above, "negative" or "positive" with a_h = -+2^(-8k/H), or "none". weights: "sigmoid" or "softmax".
    """

    window: int = 128
    slopes: Literal["balanced", "negative", "positive", "none"] = "balanced"
    weights: Literal["sigmoid", "softmax"] = "sigmoid"
    block: ClassVar[int] = 1

    info = Info(
        slug="swat", phase="prefill", also=frozenset({"decode"}), needs=frozenset({"training"}),
        opened={"window": 1 << 30, "slopes": "none", "weights": "softmax"}, tiny={"window": 24},
        opts_out={"stepwise": "a sequence that begins with a call of one single token has that token attended by softmax"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_sizes("swat", window=self.window)
        for name, known in (("slopes", ("balanced", "negative", "positive", "none")), ("weights", ("sigmoid", "softmax"))):
            if getattr(self, name) not in known:
                raise ValueError(f"swat({name}={getattr(self, name)!r}) is not one of {', '.join(known)}")

    def head_slopes(self, heads: int) -> Tensor | None:
        """a_h of so many query heads, float64 `(heads,)`."""
        if self.slopes == "none":
            return None
        if self.slopes == "balanced":
            near = (heads + 1) // 2
            return torch.cat([-(2.0 ** -torch.arange(1, near + 1).double()), 2.0 ** -torch.arange(1, heads - near + 1).double()])
        ratio = 2.0 ** (-8 * torch.arange(1, heads + 1).double() / heads)
        return ratio if self.slopes == "positive" else -ratio

    def pattern(self, ctx: LayerContext) -> Pattern | None:
        return None if self.window >= ctx.seen else window_pattern(self.window)

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return exact_rows(q.shape[2], k.shape[2], min(self.window, k.shape[2]), 1, 1, q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.weights == "softmax" and self.slopes == "none" and self.window >= k.shape[2]:
            return ctx.attend(q, k, v, None)
        # the cache may have dropped older tokens: what it holds are the last ones, one after the other
        ctx.count(sum(chunk.pairs for chunk in chunks(q.shape[2], k.shape[2], self.window)))
        return banded_attention(
            q, k, v, window=self.window, scale=ctx.scale, softcap=ctx.softcap, slopes=self.head_slopes(q.shape[1]), weights=self.weights
        )

    def due(self, ctx: LayerContext, length: int) -> bool:
        # steps read the last w entries anyway, so a few more may pile up before they are dropped together
        return length >= self.window + max(1, self.window // 8)
