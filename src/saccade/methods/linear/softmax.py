"""Softmax attention as a mixer: the yardstick, and the exact part of hybrids.

    y_t = W_o sum_j softmax_j(q_t . k_j D^-1/2) v_j   over all tokens so far, or over the last `window` of them and the first `sinks`

Grouped queries where the shape has fewer key/value heads. Without a window the state is the keys and values of all tokens (a KVLayer);
with one it has as many bytes at every length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.cache.kv_store import KVStore
from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.ops import attend, decode
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.rotary import RotaryEmbedding
from saccade.parts.linear.window import NEVER, attend_window


@register
@dataclass(frozen=True, kw_only=True)
class Softmax(Mixer):
    """window: keys a query sees, its own among them; None: all. sinks: first tokens that stay visible behind a window.
    rotary: turn queries and keys by their positions, by angles of base theta. qk_norm: RMS norm of queries and keys per head before that.
    gate: multiply by sigmoid(W x) before the last projection. bias: in the projections of q, k and v. kv_from: read the keys and values of
    that earlier layer, which has the same window, in place of own ones (cross-layer sharing, hymba); nothing is then kept."""

    window: int | None = None
    sinks: int = 0
    rotary: bool = True
    theta: float = 10000.0
    qk_norm: bool = False
    gate: bool = False
    bias: bool = False
    kv_from: int | None = None

    info = Info(
        slug="softmax", phase="mixer", needs=frozenset({"training"}),
        variants=(
            {"window": 16}, {"window": 16, "sinks": 3, "gate": True, "qk_norm": True}, {"window": 1}, {"window": 100, "sinks": 5},
        ),
        opts_out={"constant": "without a window the keys and values of all tokens are kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: give at least 1 token, or None for no window")
        if self.sinks < 0 or (self.sinks and self.window is None):
            raise ValueError(f"sinks={self.sinks}, window={self.window}: give at least 0 sinks, and a window where there are any")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.kv_from is not None and not 0 <= self.kv_from < shape.layer:
            raise ValueError(f"layer {shape.layer} can't read the keys of layer {self.kv_from}: name an earlier layer, counted from 0")
        return SoftmaxMixer(shape, self)


class Left(NamedTuple):
    """What a layer leaves for later layers that read its keys: k, v as attended to, what was kept before, which of them are tokens."""

    k: Tensor
    v: Tensor
    past: Mapping[str, Any]
    real: Tensor | None
    window: tuple[int | None, int]


class SoftmaxMixer(TokenMixer):
    """The layer. Its projections have the names and layouts of a Llama's attention layer."""

    batches_padding = True

    def __init__(self, shape: MixerShape, method: Softmax) -> None:
        super().__init__(shape)
        self.method, self.heads, self.kv_heads = method, shape.heads, shape.kv_heads
        d = shape.head_dim
        self.q_proj = nn.Linear(shape.dim, self.heads * d, bias=method.bias)
        if method.kv_from is None:
            self.k_proj = nn.Linear(shape.dim, self.kv_heads * d, bias=method.bias)
            self.v_proj = nn.Linear(shape.dim, self.kv_heads * d, bias=method.bias)
        self.o_proj = nn.Linear(self.heads * d, shape.dim, bias=False)
        self.rotary = RotaryEmbedding(d, method.theta) if method.rotary else None
        self.q_norm, self.k_norm = (nn.RMSNorm(d, eps=1e-6) if method.qk_norm else nn.Identity() for _ in range(2))
        self.out_gate = OutputGate(shape.dim, self.heads * d, "sigmoid") if method.gate else None

    def queries(self, x: Tensor, call: Call) -> Tensor:
        """`(B, Hq, N, D)`, turned to their positions."""
        q = self.q_norm(heads_first(self.q_proj(x), self.heads))
        return q if self.rotary is None else self.rotary(q, call.positions)

    def keys(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Keys, turned to their positions, and values `(B, Hk, N, D)`."""
        k = self.k_norm(heads_first(self.k_proj(x), self.kv_heads))
        k = k if self.rotary is None else self.rotary(k, call.positions)
        return k, heads_first(self.v_proj(x), self.kv_heads)

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """y `(B, N, dim)` of attention's output `(B, Hq, N, D)`."""
        y = out.transpose(1, 2).flatten(2)
        return self.o_proj(y if self.out_gate is None else self.out_gate(y, x))

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, window = self.queries(x, call), (self.method.window, self.method.sinks)
        kept: dict[str, Any] = {}
        if self.method.kv_from is not None:
            left = self._left(call, window)
            if window[0] is None:
                return self.finish(attend_all(q, left.k, left.v, call, left.real), x), kept
            out, _ = attend_window(q, left.k, left.v, left.past, replace(call, keep=False), window=window[0], sinks=window[1])
            return self.finish(out, x), kept
        k, v = self.keys(x, call)
        real = call.real
        if window[0] is not None:
            out, kept = attend_window(q, k, v, past, call, window=window[0], sinks=window[1])
        else:
            if past or call.keep:
                store = past.get("kv") or KVStore()
                k, v, real = store.append(k, v, real)
                kept = {"kv": store}
            out = attend_all(q, k, v, call, real)
        call.layers[self.shape.layer] = Left(k, v, past, real, window)
        return self.finish(out, x), kept

    def naive(self, x: Tensor) -> Tensor:
        call = self.whole(x)
        q, (k, v), n = self.queries(x, call), self.keys(x, call), x.shape[1]
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)
        mask = j <= i
        if self.method.window is not None:
            mask = mask & ((i - j < self.method.window) | (j < self.method.sinks))
        return self.finish(partial_softmax(q, k, v, mask).out.to(x.dtype), x)

    def _left(self, call: Call, window: tuple[int | None, int]) -> Left:
        left = call.layers.get(self.method.kv_from or 0)
        if not isinstance(left, Left):
            raise ValueError(f"layer {self.method.kv_from} left no keys to read: let it be softmax attention, in the same stack of layers")
        if left.window != window:
            raise ValueError(
                f"layer {self.shape.layer} has window and sinks {window} and reads the keys of layer {self.method.kv_from} with "
                f"{left.window}: give both the same"
            )
        return left


def attend_all(q: Tensor, k: Tensor, v: Tensor, call: Call, real: Tensor | None) -> Tensor:
    """Causal attention of the newest tokens q `(B, Hq, N, D)` over all k, v `(B, Hk, M, D)`, of which real `(B, M)` are tokens."""
    if real is None:
        if q.shape[2] == 1 and not (torch.is_grad_enabled() and q.requires_grad):
            return decode(q, k, v).out
        return attend(q, k, v, causal=True).out
    # a token's place among the real ones of its row; gaps are seen by none
    places = (real.cumsum(-1) - 1).masked_fill(~real, NEVER).to(torch.int32)
    own = (call.start[:, None] + torch.arange(q.shape[2], device=q.device)).to(torch.int32)
    return attend(q, k, v, causal=True, q_positions=own.unsqueeze(1), k_positions=places.unsqueeze(1)).out
