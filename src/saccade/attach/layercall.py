"""One attention call of the model on one layer, and its rows without padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from saccade.cache import KVLayer


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """q `(B, Hq, m, D)`; k, v: what the model passed (all entries, or the new ones where the cache is not one rectangle).
    real `(B, m)` marks tokens that are not padding, None for all. shared: across the layers of this forward pass. hidden: the layer's
    inputs `(B, m, C)`, where a method reads them. again: places `(B, r)` of the first r of the m tokens, which were dropped and run
    again; None where all m are new."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    real: Tensor | None
    shared: dict[str, Any]
    hidden: Tensor | None = None
    again: Tensor | None = None

    def parted(self) -> tuple[LayerCall, LayerCall]:
        """The tokens that run again, and the new ones; both with all of k and v."""
        r = 0 if self.again is None else self.again.shape[1]
        first, rest = (
            replace(
                self, q=self.q[:, :, own], real=None if self.real is None else self.real[:, own],
                hidden=None if self.hidden is None else self.hidden[:, own], again=again,
            )
            for own, again in ((slice(r), self.again), (slice(r, None), None))
        )  # fmt: skip
        return first, rest


def between_calls(layer: KVLayer | None) -> LayerCall:
    """What a method may know while no attention call runs: that of the layer's last one, without its tokens."""
    assert layer is not None and layer.facts is not None and layer.tail is not None
    (layout, scale, softcap), batch = (layer.facts.layout, layer.facts.scale, layer.facts.softcap), layer.tail.keys.shape[0]
    heads = ((layout.query_heads, layout.head_dim), (layout.kv_heads, layout.head_dim), (layout.kv_heads, layout.value_dim))
    q, k, v = (layer.tail.keys.new_empty(batch, count, 0, dim) for count, dim in heads)
    return LayerCall(q=q, k=k, v=v, scale=scale, softcap=softcap, real=None, shared={})


def rows_of(batch: int, padded: bool) -> list[int | None]:
    """Rows differ by padding: one after the other, so that each sees its own tokens only. Else all at once."""
    return list(range(batch)) if padded else [None]


def row_of_call(call: LayerCall, row: int | None, *, queries_only: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v of one row without its padding, and which of the call's tokens are real."""
    if row is None:
        return call.q, call.k, call.v, None
    mine = slice(row, row + 1)
    real = None if call.real is None else call.real[row]
    q, k, v = call.q[mine], call.k[mine], call.v[mine]
    if real is None:
        return q, k, v, None
    if queries_only:
        return q[:, :, real], k, v, real
    return q[:, :, real], k[:, :, real], v[:, :, real], real


def hidden_of(call: LayerCall, row: int | None) -> Tensor | None:
    """The layer's inputs of one row without its padding, or of all rows."""
    if call.hidden is None or row is None:
        return call.hidden
    mine = call.hidden[row : row + 1]
    return mine if call.real is None else mine[:, call.real[row]]


def scatter(out: Tensor, real: Tensor | None, m: int) -> Tensor:
    """Put a row's outputs back among its padding, which gives 0."""
    if real is None:
        return out
    full = out.new_zeros(*out.shape[:2], m, out.shape[-1])
    full[:, :, real] = out
    return full
