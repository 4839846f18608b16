"""Dense attention: the ceiling that every method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection, register


@register
@dataclass(frozen=True, kw_only=True)
class Dense(Prefill):
    """Every query reads every visible key."""

    info = Info(slug="dense", phase="prefill")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ctx.attend(q, k, v, None)
