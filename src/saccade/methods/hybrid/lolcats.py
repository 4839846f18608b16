"""LoLCATs: softmax over a small window and learned linear attention over all that lies before it, under one denominator.

    y_t = (a sum_{t-w<j<=t} e^(l_tj - m_t) v_j + sum_{j<=t-w} phi_q(q_t).phi_k(k_j) v_j) / (the same sums without v)
    l_tj = q_t . k_j D^-1/2,   m_t = max over the window,   a = sigmoid(c) per head, 0.1 at first
    phi(x) = [softmax(W x), softmax(-W x)], a W for every query head, others for q and k

q and k are those of the trained model, after its rotary embedding. The maps are taught first, layer by layer, to give the outputs of the
softmax they replace; then adapters of low rank repair the model (`saccade.train.convert`). A token enters the linear state when it leaves
the window, so the state has as many bytes at every length.

Source: lolcats, arXiv 2410.10254.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.softmax import Softmax, SoftmaxMixer
from saccade.ops.scan import scan
from saccade.parts.linear.band import band_partial
from saccade.parts.linear.features import FeatureMap, Hedgehog, feature_map
from saccade.parts.linear.partial import shared_denominator
from saccade.parts.linear.tokens import last_tokens

Map = Literal["hedgehog", "elu+1", "relu"]


@register
@dataclass(frozen=True, kw_only=True)
class Lolcats(Mixer):
    """window: tokens a query reads by softmax, its own among them; 0: none. feature_map: "hedgehog" is learned, "elu+1" and "relu" are
    fixed. features: rows of W, default head_dim; phi has twice as many. factor: a at first, in (0, 1). affine: weigh the linear part by
    1 - a. rotary, theta, bias: of the projections, as those of the model that is converted."""

    window: int = 64
    feature_map: Map = "hedgehog"
    features: int | None = None
    factor: float = 0.1
    affine: bool = False
    rotary: bool = True
    theta: float = 10000.0
    bias: bool = False

    info = Info(
        slug="lolcats", phase="mixer", needs=frozenset({"training"}), tiny={"window": 16},
        variants=(
            {"window": 1, "affine": True, "features": 4}, {"window": 0, "rotary": False}, {"window": 100, "bias": True},
            {"window": 5, "feature_map": "elu+1"},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window={self.window}: give at least 0 tokens")
        if self.feature_map not in get_args(Map):
            raise ValueError(f"feature_map={self.feature_map!r} is not one of {', '.join(get_args(Map))}")
        if self.features is not None and (self.features < 1 or self.feature_map != "hedgehog"):
            raise ValueError(f"features={self.features}, feature_map={self.feature_map!r}: give at least 1, and only with 'hedgehog'")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor={self.factor}: give a number between 0 and 1")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LolcatsMixer(shape, self)


class LolcatsMixer(SoftmaxMixer):
    """The layer: softmax attention's projections, maps and mixing factors beside them."""

    def __init__(self, shape: MixerShape, method: Lolcats) -> None:
        super().__init__(shape, Softmax(rotary=method.rotary, theta=method.theta, bias=method.bias))
        self.window, self.affine = method.window, method.affine
        self.q_map, self.k_map = (_map(method, shape) for _ in range(2))
        # without a window there is nothing to weigh
        logit = torch.full((shape.heads, 1, 1), method.factor).logit()
        self.factor = nn.Parameter(logit) if method.window else None

    def phi(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi_q(q) and phi_k(k), both `(B, H, N, F)` and float32 at least."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return self.q_map(q).to(wide), self.k_map(k.repeat_interleave(self.heads // self.kv_heads, dim=1)).to(wide)

    def factors(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """The factors of the exact and of the linear part."""
        if self.factor is None:
            return 1.0, 1.0
        a = self.factor.to(like.dtype).sigmoid()
        return a, 1 - a if self.affine else 1.0

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        w, n = self.window, x.shape[1]
        new = [t.transpose(1, 2) for t in (k, v)]
        empty = [t.new_zeros(t.shape[0], w, *t.shape[2:]) for t in new]
        held = [past[name].to(t.dtype) if name in past else t for name, t in zip("kv", empty, strict=True)]
        # with every new token the one w before it leaves the window
        old_k, old_v = (torch.cat([h, t], dim=1)[:, :n].transpose(1, 2) for h, t in zip(held, new, strict=True))
        phi_q, phi_k = self.phi(q, old_k)
        gone = torch.arange(n, device=x.device) >= (w - call.start)[:, None]
        phi_k = call.masked(phi_k.masked_fill(~gone[:, None, :, None], 0.0))
        ones = torch.cat([old_v.to(phi_k.dtype), torch.ones_like(old_v[..., :1], dtype=phi_k.dtype)], dim=-1)
        sums, state = scan(phi_q, phi_k, ones, initial_state=past.get("s"), scale=1.0, return_state=call.keep)
        kept: dict[str, Any] = {}
        if call.keep:
            kept = {name: last_tokens(h, t, call.lengths) for name, h, t in zip("kv", held, new, strict=True)}
            kept["s"] = state
        value, total = sums[..., :-1], sums[..., -1:]
        if not w:
            return self.finish(_divided(value, total).to(x.dtype), x), kept
        a, rest = self.factors(value)
        exact = band_partial(q, k, v, held[0], held[1], call.start, window=w)
        return self.finish(shared_denominator(exact, rest * value, rest * total, exact_factor=a).to(x.dtype), x), kept

    def naive(self, x: Tensor) -> Tensor:
        call, n, group = self.whole(x), x.shape[1], self.heads // self.kv_heads
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        phi_q, phi_k = self.phi(q, k)
        k, v = (t.repeat_interleave(group, dim=1).to(phi_q.dtype) for t in (k, v))
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)
        far = i - j >= self.window
        a, rest = self.factors(phi_q)
        weights = rest * (phi_q @ phi_k.mT) * far
        if self.window:
            logits = (q.to(k.dtype) @ k.mT * q.shape[-1] ** -0.5).masked_fill(far | (j > i), float("-inf"))
            weights = weights + a * (logits - logits.amax(-1, keepdim=True)).exp()
        else:
            weights = weights.tril()
        return self.finish(_divided(weights @ v, weights.sum(-1, keepdim=True)).to(x.dtype), x)


def _map(method: Lolcats, shape: MixerShape) -> FeatureMap:
    if method.feature_map != "hedgehog":
        return feature_map(method.feature_map)
    made = Hedgehog(shape.heads, shape.head_dim, method.features)
    nn.init.normal_(made.weight, std=shape.head_dim**-0.5)
    return made


def _divided(value: Tensor, total: Tensor) -> Tensor:
    # where "relu" leaves no weight at all, nothing is read
    return value / total.masked_fill(total == 0, 1.0)
