"""Mega: a damped moving average gives single-head gated attention its local context; in chunks its cost is linear.

    m = silu(EMA(x) + w x),   v = silu(W_v x)                                    v sees x itself, not its average
    u, z, r, c = W m,   u = sigmoid(u),   z, r = silu(z), silu(r)
    q = z g_0 + b_0,   k = z g_1 + b_1                                           Z channels, one head
    A = softmax(q k^T Z^-1/2 + bias)   or   f(q k^T / n + bias), n the number of keys seen, f = relu^2 or laplace
    h = silu(c + W_h (r (A v))),   y = u (h - x)

x + y is the paper's block: the residual, like the norm before, is that of the block around. Attention stays inside chunks counted from
the sequence's start, while the average runs through; a chunk no shorter than the sequence is attention over all tokens. laplace is
(1 + erf((s - mu) / (sd sqrt 2))) / 2, which has the value and the slope of relu^2 at sqrt(1/2) and stays below 1.

Source: mega, arXiv 2209.10655.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import TwoWayMixer
from saccade.parts.linear.ema import BothEMA, DampedEMA
from saccade.parts.linear.gated_unit import GatedUnit
from saccade.parts.linear.pieces import pieces
from saccade.parts.linear.rotary import RotaryEmbedding


@register
@dataclass(frozen=True, kw_only=True)
class Mega(TwoWayMixer):
    """features: of the moving average, for each channel. chunk: tokens attention stays among. attention: "softmax" (language), "relu2" or
    "laplace" (images, long sequences). bias: "rotary" (two vectors turned by positions) or "table" (a scalar for each distance).
    narrow: channels of q and k (default: dim / 4). expand: channels of v in multiples of dim. bidirectional: read all tokens of the chunk,
    with a second average from the end."""

    features: int = 16
    chunk: int = 2048
    attention: Literal["softmax", "relu2", "laplace"] = "softmax"
    bias: Literal["rotary", "table"] = "rotary"
    narrow: int | None = None
    expand: int = 2

    info = Info(
        slug="mega", phase="mixer", needs=frozenset({"training"}), tiny={"chunk": 16, "features": 4},
        variants=(
            {"attention": "laplace", "bias": "table", "features": 2, "chunk": 128}, {"attention": "relu2", "chunk": 16, "narrow": 6},
            {"chunk": 1}, {"bidirectional": True, "chunk": 16}, {"bidirectional": True, "attention": "laplace", "bias": "table"},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("softmax", "relu2", "laplace"):
            raise ValueError(f"attention={self.attention!r} is not 'softmax', 'relu2' or 'laplace'")
        if self.bias not in ("rotary", "table"):
            raise ValueError(f"bias={self.bias!r} is not 'rotary' or 'table'")
        for name in ("features", "chunk", "expand"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.narrow is not None and self.narrow < 1:
            raise ValueError(f"narrow={self.narrow}: give at least 1 channel, or None for a quarter of the width")

    def build(self, shape: MixerShape) -> TokenMixer:
        return MegaMixer(shape, self)


class MegaMixer(TokenMixer):
    """The layer: one head, whatever the shape has."""

    def __init__(self, shape: MixerShape, method: Mega) -> None:
        super().__init__(shape)
        d, self.method = shape.dim, method
        self.ema = (BothEMA if method.bidirectional else DampedEMA)(d, method.features)
        self.gated = GatedUnit(d, method.narrow or max(d // 4 // 2 * 2, 2), method.expand * d)
        self.bias = DistanceBias(self.gated.narrow, method.chunk, method.bias)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        averaged, state = self.ema(x, past.get("ema"))
        q, k, v, gates = self.gated.enter(x, F.silu(averaged))
        chunk = self.method.chunk
        start = int(call.start[0])
        held = [past[name].to(new.dtype) if past else new[:, :0] for name, new in (("k", k), ("v", v))]
        seen: list[Tensor] = [one[:, : start % chunk] for one in held]
        outs = []
        for begin, end in pieces(start, x.shape[1], chunk):
            before = (start + begin) % chunk
            seen = [torch.cat([old[:, :before], new[:, begin:end]], dim=1) for old, new in zip(seen, (k, v), strict=True)]
            rows, cols = (torch.arange(i, before + end - begin, device=x.device) for i in (before, 0))
            outs.append(self.attend(q[:, begin:end], seen[0], seen[1], rows[:, None] - cols))
        kept: dict[str, Any] = {}
        if call.keep and not self.method.bidirectional:
            full = (start + x.shape[1]) % chunk
            kept = {name: F.pad(one[:, :full], (0, 0, 0, chunk - full)) for name, one in zip("kv", seen, strict=True)}
            kept["ema"] = state
        return self.gated.leave(torch.cat(outs, 1), x, gates), kept

    def naive(self, x: Tensor) -> Tensor:
        q, k, v, gates = self.gated.enter(x, F.silu(self.ema.one_by_one(x)))
        i = torch.arange(x.shape[1], device=x.device)
        return self.gated.leave(self.attend(q, k, v, i[:, None] - i, i[:, None] // self.method.chunk == i // self.method.chunk), x, gates)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, distance: Tensor, near: Tensor | None = None) -> Tensor:
        """Attention of q `(B, n, Z)` over k `(B, m, Z)`, v `(B, m, H)` at these distances `(n, m)`, where near `(n, m)` is True."""
        wide = torch.promote_types(q.dtype, torch.float32)
        mask = torch.ones_like(distance, dtype=torch.bool) if near is None else near
        mask = mask if self.method.bidirectional else mask & (distance >= 0)
        bias = self.bias(distance.masked_fill(~mask, 0), wide)
        scores = q.to(wide) @ k.to(wide).mT
        if self.method.attention == "softmax":
            weights = (scores * q.shape[-1] ** -0.5 + bias).masked_fill(~mask, float("-inf")).softmax(-1)
        else:
            scores = scores / mask.sum(-1, keepdim=True) + bias
            weights = (laplace(scores) if self.method.attention == "laplace" else scores.relu().square()) * mask
        return (weights @ v.to(wide)).to(q.dtype)


class DistanceBias(nn.Module):
    """A learned number for each distance i - j: from a table, or `a_i . b_j` of two vectors turned to i and j."""

    def __init__(self, width: int, chunk: int, kind: Literal["rotary", "table"]) -> None:
        super().__init__()
        self.chunk = chunk
        if kind == "table":
            self.table: nn.Parameter | None = nn.Parameter(0.02 * torch.randn(2 * chunk - 1))
        else:
            self.table = None
            self.rows, self.cols = (nn.Parameter(0.02 * torch.randn(width)) for _ in range(2))
            self.rotary = RotaryEmbedding(width)

    def forward(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        if self.table is not None:
            return self.table.to(dtype)[distance + self.chunk - 1]
        low, high = int(distance.min()), int(distance.max())
        steps = torch.arange(low, high + 1, device=distance.device)
        turned = self.rotary(self.rows.to(dtype).expand(1, 1, len(steps), -1), steps.unsqueeze(0))[0, 0]
        return (turned @ self.cols.to(dtype))[distance - low]


def laplace(scores: Tensor) -> Tensor:
    """A smooth step from 0 to 1 that follows relu^2 around sqrt(1/2)."""
    mean, deviation = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
    return 0.5 * (1 + torch.erf((scores - mean) / (deviation * math.sqrt(2))))
