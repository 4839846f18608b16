"""Attamba: state space models stand in for the key and value projections, and attention reads only the ends of chunks and a few tokens.

    K = SSM_k(x) + x,   V = SSM_v(x) + x,   q = W_q x,   rotary embedding on q and K
    SSM: S_t = e^(-a d_t) S_{t-1} + d_t b_t u_t^T,   W_o (silu(z_t) (c_t S_t + w u_t)),   S = 0 at the start of every chunk
    query t sees key j  if  j is the end of a chunk and j < t,  or  t - lead <= j <= t

A key sums up its chunk as far as itself. Chunks end after every P tokens, moved from layer to layer by min(P - 1, l floor(P / layers)), so
that no place in the sequence is last everywhere; the first token is a chunk of its own. The last token of a sequence, which the paper makes
an end too, is seen by none after it. Kept are the keys of the chunks' ends and of the last `lead` tokens.

Source: attamba, arXiv 2411.17685.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.cache.kv_store import KVStore
from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.chunk_ssm import ChunkSSM
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.rotary import RotaryEmbedding
from saccade.parts.linear.tokens import last_tokens


@register
@dataclass(frozen=True, kw_only=True)
class Attamba(Mixer):
    """chunk: P, tokens of a chunk. lead: tokens before a query that it sees too (default: P). ends: where chunks end: "cyclic" (moved from
    layer to layer), "uniform" (the same in all) or "random" (one place in every P tokens, drawn by a fixed rule). every: see all keys, not
    the ends alone (the paper's ablation). states: rows of the state of a head. theta: base of the rotary embedding."""

    chunk: int = 8
    lead: int | None = None
    ends: Literal["cyclic", "uniform", "random"] = "cyclic"
    every: bool = False
    states: int = 16
    theta: float = 10000.0

    info = Info(
        slug="attamba", phase="mixer", needs=frozenset({"training"}),
        variants=({"chunk": 5, "lead": 0, "ends": "random"}, {"chunk": 16, "lead": 100, "ends": "uniform"}, {"every": True}, {"chunk": 1}),
        opts_out={
            "constant": "the keys and values of all chunks' ends are kept",
            "kv_heads": "keys are the tokens themselves, as wide as the model, so no heads share them",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.ends not in ("cyclic", "uniform", "random"):
            raise ValueError(f"ends={self.ends!r} is not 'cyclic', 'uniform' or 'random'")
        if self.chunk < 1 or (self.lead is not None and self.lead < 0) or self.states < 1:
            raise ValueError(f"chunk={self.chunk}, lead={self.lead}, states={self.states}: give at least 1, and 0 for lead")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        if shape.kv_heads != shape.heads or shape.heads * shape.head_dim != shape.dim:
            raise ValueError(
                f"{shape.kv_heads} key heads, {shape.heads} heads of {shape.head_dim} channels: keys are the tokens themselves, so let all "
                f"heads have keys and make up the width {shape.dim}"
            )
        return AttambaMixer(shape, self)


class AttambaMixer(TokenMixer):
    """The layer."""

    def __init__(self, shape: MixerShape, method: Attamba) -> None:
        super().__init__(shape)
        self.method, self.heads = method, shape.heads
        self.lead = method.chunk if method.lead is None else method.lead
        self.q_proj, self.o_proj = (nn.Linear(shape.dim, shape.dim, bias=False) for _ in range(2))
        self.k_ssm, self.v_ssm = (ChunkSSM(shape.dim, shape.heads, method.states) for _ in range(2))
        self.rotary = RotaryEmbedding(shape.head_dim, method.theta)

    # -- which keys are seen -----------------------------------------------------------------------------------------------

    def is_end(self, places: Tensor) -> Tensor:
        """Whether a chunk ends at these places of the sequence, int64 of any shape."""
        size, layer = self.method.chunk, self.shape.layer
        if self.method.ends == "random":
            # a multiplicative hash of the stretch and the layer
            mixed = ((places // size + 1) * 40503 + (layer + 1) * 30011) % 65536
            last = (mixed * mixed // 256) % 65536 % size
        else:
            offset = min(size - 1, layer * (size // self.shape.layers)) if self.method.ends == "cyclic" else 0
            last = (offset + size - 1) % size
        return (places % size == last) | (places == 0)

    def visible(self, places: Tensor) -> Tensor:
        """Whether keys at these places are seen from afar."""
        return torch.ones_like(places, dtype=torch.bool) if self.method.every else self.is_end(places)

    def mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """`(n, m)` bool: which of the keys at places `(m,)` the queries at places `(n,)` see."""
        i = queries[:, None]
        return ((keys < i) & self.visible(keys)) | ((keys >= i - self.lead) & (keys <= i))

    # -- the forms ---------------------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        start, n = int(call.start[0]), x.shape[1]
        places = torch.arange(start, start + n, device=x.device)
        begins = (places == 0) | self.is_end(places - 1)
        k, k_state = self.k_ssm(x, begins, past.get("k_state"))
        v, v_state = self.v_ssm(x, begins, past.get("v_state"))
        q, k, v = self._heads(x, x + k, x + v, call)
        held = [past[name].to(new.dtype) if past else _none(new, self.lead) for name, new in (("k", k), ("v", v))]
        kept: dict[str, Any] = {}
        seen = self.visible(places)
        if past or call.keep:
            store = past.get("ends") or KVStore()
            far_k, far_v = _append(store, k[:, :, seen], v[:, :, seen])
            kept = {"ends": store, "k_state": k_state, "v_state": v_state}
            kept |= {name: last_tokens(old, new.transpose(1, 2), None) for name, old, new in zip("kv", held, (k, v), strict=True)}
        else:
            far_k, far_v = k[:, :, seen], v[:, :, seen]
        before = torch.arange(start + n, device=x.device)
        before = before[self.visible(before)]
        first = max(start - self.lead, 0)
        near_k, near_v = (
            torch.cat([old[:, self.lead - (start - first) :].transpose(1, 2), new], 2) for old, new in zip(held, (k, v), strict=True)
        )
        outs, size = [], max(self.lead + 1, 64)
        for begin in range(0, n, size):
            own = places[begin : begin + size]
            count = int((before < own[-1] - self.lead).sum())
            low = max(start + begin - self.lead, 0) - first
            high = int(own[-1]) + 1 - first
            close = torch.arange(low + first, high + first, device=x.device)
            mask = torch.cat([before[:count] < own[:, None] - self.lead, (close >= own[:, None] - self.lead) & (close <= own[:, None])], 1)
            keys, values = (torch.cat([a[:, :, :count], b[:, :, low:high]], 2) for a, b in ((far_k, near_k), (far_v, near_v)))
            outs.append(partial_softmax(q[:, :, begin : begin + size], keys, values, mask).out)
        return self._finish(torch.cat(outs, 2), x), kept

    def naive(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        begins = (places == 0) | self.is_end(places - 1)
        q, k, v = self._heads(x, x + self.k_ssm.naive(x, begins), x + self.v_ssm.naive(x, begins), self.whole(x))
        return self._finish(partial_softmax(q, k, v, self.mask(places, places)).out, x)

    def _heads(self, x: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (heads_first(one, self.heads) for one in (self.q_proj(x), k, v))
        return self.rotary(q, call.positions), self.rotary(k, call.positions), v

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        return self.o_proj(out.transpose(1, 2).flatten(2).to(x.dtype))


def _none(new: Tensor, n: int) -> Tensor:
    return F.pad(new[:, :, :0], (0, 0, 0, n)).transpose(1, 2)


def _append(store: KVStore, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """All that the store holds after adding k, v `(B, H, m, D)`, m may be 0, without its padding: as many of each row."""
    if k.shape[2]:
        k, v, real = store.append(k, v, None)
    else:
        tail = store.layer.tail
        assert tail is not None  # the first token is the end of a chunk
        k, v, real = tail.keys, tail.values, tail.real
    if real is None:
        return k, v
    order = torch.sort((~real).to(torch.uint8), dim=1, stable=True).indices[:, : int(real.sum(1).max())]
    index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    return k.gather(2, index), v.gather(2, index)
