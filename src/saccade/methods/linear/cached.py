"""Layers that keep keys and values, as softmax attention does, and read them by another rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.cache.kv_store import KVStore
from saccade.core import Call
from saccade.methods.linear.softmax import SoftmaxMixer
from saccade.parts.linear.tokens import last_tokens
from saccade.parts.linear.window import NEVER


class CachedMixer(SoftmaxMixer):
    """The projections and the state of softmax attention; subclasses write `read` and, for `naive`, `define`.

    Without a window all keys are kept in a growing KVLayer, with one the last `window - 1` of them in as many bytes at every length.
    """

    @abstractmethod
    def read(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call, own: Tensor, places: Tensor) -> Tensor:
        """`(B, Hq, N, Dv)` of q `(B, Hq, N, D)` at places own `(B, N)` over k, v `(B, Hk, M, D)` at places `(B or 1, M)`, NEVER where
        there is no token. A query sees the keys up to its own place, within the window if there is one."""

    @abstractmethod
    def define(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor, call: Call) -> Tensor:
        """The same of a whole sequence by the paper's definition; k and v have as many heads as q; mask `(N, N)` bool."""

    def values(self, v: Tensor, x: Tensor, call: Call) -> Tensor:
        """Values `(B, Hk, N, Dv)` as they are kept."""
        return v

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        v = self.values(v, x, call)
        own = call.start[:, None] + torch.arange(x.shape[1], device=x.device)
        held = self._windowed if self.method.window else self._all
        k, v, places, kept = held(k, v, past, call, own)
        return self.finish(self.read(q, k, v, x, call, own, places).to(x.dtype), x), kept

    def naive(self, x: Tensor) -> Tensor:
        call, n = self.whole(x), x.shape[1]
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        v = self.values(v, x, call)
        wide = torch.promote_types(x.dtype, torch.float32)
        q, k, v = (y.to(wide).repeat_interleave(self.heads // y.shape[1], 1) for y in (q, k, v))
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if self.method.window:
            mask = mask.triu(1 - self.method.window)
        return self.finish(self.define(q, k, v, x, mask, call).to(x.dtype), x)

    def _all(
        self, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call, own: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        real, kept = call.real, {}
        if past or call.keep:
            store = past.get("kv") or KVStore()
            k, v, real = store.append(k, v, real)
            kept = {"kv": store}
        if real is None:
            return k, v, torch.arange(k.shape[2], device=k.device)[None], kept
        return k, v, (real.cumsum(-1) - 1).masked_fill(~real, NEVER), kept

    def _windowed(
        self, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call, own: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        w = (self.method.window or 1) - 1
        old = [
            x.new_zeros(x.shape[0], w, x.shape[1], x.shape[3]) if name not in past else past[name].to(x.dtype)
            for name, x in (("k", k), ("v", v))
        ]
        kept: dict[str, Any] = {}
        if call.keep:
            kept = {name: last_tokens(held, x.transpose(1, 2), call.lengths) for name, held, x in zip("kv", old, (k, v), strict=True)}
        before = call.start[:, None] - w + torch.arange(w, device=k.device)
        now = own if call.real is None else own.masked_fill(~call.real, NEVER)
        k, v = (torch.cat([held.transpose(1, 2), x], dim=2) for held, x in zip(old, (k, v), strict=True))
        return k, v, torch.cat([before.masked_fill(before < 0, NEVER), now], dim=1), kept
