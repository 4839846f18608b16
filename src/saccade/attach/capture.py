"""Reading a model's queries, keys and values, layer by layer, from one dense run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.session import Session
from saccade.core import Info, LayerContext, Prefill, Selection


@dataclass(frozen=True, kw_only=True)
class Captured:
    """One layer of one call: q `(B, Hq, N, D)`, k `(B, Hk, N, D)`, v and out `(B, Hq, N, Dv)` as attention saw them (after RoPE)."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float


Callback = Callable[[LayerContext, Tensor, Tensor, Tensor, Tensor], None]
Dense = Callable[[LayerContext, Tensor, Tensor, Tensor], Tensor]


class _Reader(Prefill):
    """Dense attention, or what gives the same, that hands q, k, v to a callback."""

    info = Info(slug="reader", phase="prefill")
    callback: Callback
    dense: Dense | None

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ctx.attend(q, k, v, None) if self.dense is None else self.dense(ctx, q, k, v)
        self.callback(ctx, q, k, v, out)
        return out


def reading_session(model: PreTrainedModel, callback: Callback, dense: Dense | None = None) -> Session:
    """A session in which every prompt runs densely and each layer's q, k, v and output go to the callback as well.

    dense: what works out the output `(B, Hq, N, Dv)` of a layer in place of dense attention, for those who need its scores too.
    """
    reader = _Reader()
    object.__setattr__(reader, "callback", callback)
    object.__setattr__(reader, "dense", dense)
    return Session(model, reader, None, None, {}, "prompt", "auto", 0)


@contextmanager
def capture(model: PreTrainedModel) -> Iterator[list[Captured]]:
    """Inside the block, every call of the model with more than one token appends one Captured per full-attention layer."""
    captured: list[Captured] = []

    def keep(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        captured.append(Captured(layer=ctx.layer, q=q, k=k, v=v, out=out, scale=ctx.scale))

    with reading_session(model, keep):
        yield captured
