"""MagicPIG: hash collisions sample the keys that matter, with a known probability, so that attention becomes an unbiased estimate.

When a prompt has ended, its keys between the first and the newest ones are the dynamic set; mu is their mean. Hyperplanes W give every
key L codes of K sign bits. A query reads the static keys (first, newest, generated) and the dynamic ones whose code equals its own in at
least two tables, each weighted by one over the probability that this happens:

    code_l(k) = sign bits of (k - mu) W_l,      S = {i : code_l(k_i) = code_l(q) in >= 2 of L tables}
    theta_i = angle(q, k_i - mu),  p_i = 1 - theta_i / pi,  a = p_i^K,     u_i = 1 - (1 - a)^L - L a (1 - a)^(L - 1)
    logit_i = scale * q.k_i  (static),     scale * q.k_i - log(u_i + 1e-4)  (sampled),     one softmax over both

Subtracting mu from all keys shifts all logits of a query alike, so the cached keys stay as they are.
Source: magicpig, arXiv 2410.16179.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from saccade.core import Decode, Info, LayerContext, Selection, register
from saccade.core.method import LayerPolicy
from saccade.parts.ends import read_with_tail
from saccade.parts.lists import hits
from saccade.parts.lsh import CollisionIndex, collision_rate, hyperplanes
from saccade.parts.picked import picked_dots

EPSILON = 1e-4  # keeps the weights of keys that are hardly ever sampled finite


@register
@dataclass(frozen=True, kw_only=True)
class MagicPig(Decode):
    """bits: sign bits K of a code, 0 to 15; 0 means full attention. tables: L, at least 2.
    sinks, window: first and newest tokens of a prompt, always read; tokens that are generated after it join them until the next prompt
        ends, when all but the newest are hashed too.
    dense_every: layers 0, dense_every, 2 dense_every, ... read everything; 0: none does.

    How many tokens are sampled follows from the angles, head by head. The index holds each key's place in every table (int32), where
    buckets begin, and the keys' norms; its size does not depend on the head dim. The heavy part runs where the cache lies: there is no
    split between host and device.
    """

    bits: int = 10
    tables: int = 150
    sinks: int = 4
    window: int = 64
    dense_every: int = 16

    info = Info(
        slug="magicpig", phase="decode", opened={"bits": 0},
        tiny={"bits": 3, "tables": 6, "sinks": 1, "window": 8, "dense_every": 0},
        opts_out={"stepwise": "a prompt at once is read densely, tokens that come one by one are generated and join the static set"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        limits = {"bits": (0, 15), "tables": (2, 1 << 15), "sinks": (0, 1 << 30), "window": (1, 1 << 30), "dense_every": (0, 1 << 30)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"magicpig({name}={value!r}) is not a whole number from {least} to {most}")

    def layer_policy(self, layer: int, layers: int) -> LayerPolicy:
        return "dense" if self.bits == 0 or (self.dense_every and layer % self.dense_every == 0) else "select"

    def observe(self, ctx: LayerContext, k: Tensor, v: Tensor, start: int) -> None:
        if start == 0:
            ctx.state.clear()
        if k.shape[2] > 1:
            # more than one token is a prompt, and the first generated one
            ctx.state["dynamic"] = max(self.sinks, start + k.shape[2] - 1 - self.window)

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if n > ctx.state.get("dynamic", 0):
            return n
        ctx.state.clear()
        return 0

    def index(self, ctx: LayerContext, k: Tensor) -> CollisionIndex | None:
        """The hashed dynamic keys of the ended prompts; None while there are none."""
        end, index = ctx.state.get("dynamic", 0), ctx.state.get("index")
        if end <= self.sinks:
            return None
        if index is None:
            # the same planes at every length of the sequence, so that a run and its replay agree
            generator = replace(ctx, seen=0).generator()
            planes = hyperplanes(ctx.layout.kv_heads, k.shape[-1], self.tables, self.bits, generator)
            dynamic = k[:, :, self.sinks : end].to(torch.promote_types(k.dtype, torch.float32))
            index = ctx.state["index"] = CollisionIndex(planes, dynamic.mean(2, keepdim=True))
        if index.n < end - self.sinks:
            index.append(k[:, :, self.sinks + index.n : end])
        return index

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n, index = k.shape[2], self.index(ctx, k)
        if index is None:
            return Selection.full(1, n, block_q=1, block_k=n, device=q.device)
        q = q.squeeze(2)
        sampled = hits(index.collisions(q) >= 2)
        real = sampled < index.n
        places = sampled.clamp(max=index.n - 1).long()
        cosine = index.cosines(q, picked_dots(q, k, places + self.sinks), places)
        weight = -(collision_rate(cosine, self.bits, self.tables) + EPSILON).log()
        first = torch.arange(self.sinks, dtype=torch.int32, device=q.device).expand(*q.shape[:2], -1)
        ids = torch.cat([first, (sampled + self.sinks).masked_fill(~real, n)], dim=-1)
        weight = torch.cat([torch.zeros_like(first, dtype=weight.dtype), weight.masked_fill(~real, 0.0)], dim=-1)
        return read_with_tail(ids, index.n + self.sinks, n, weight)
