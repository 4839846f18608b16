"""CHELA: short and long convolutions, merged into one, give gated linear attention its local and its wide context.

    m = silu(sum over kernels of norm(kernel * x)),   v = silu(W_v x)
    u, z, r, c = W m,   u = sigmoid(u),   z, r = silu(z), silu(r),   q = z g_0 + b_0,   k = z g_1 + b_1       one head
    o_t = q_t sum_{s <= t} k_s v_s^T   in tiles,   no softmax and no denominator but an RMS norm
    h = silu(c + W_h (r norm(o))),   y = u (h - x)

x + y is the paper's block: the residual, like the norm before, is that of the block around. The long kernel is a small network of the lag
times an exponential window. A token reads the last tokens under the kernel, so a step costs as much as the kernel is long. Batch norms take
the statistics of the batch in training, so tokens of one batch, later ones too, meet there; in `eval()` they are folded into the kernel.

Source: chela, arXiv 2406.08128.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.ops.scan import scan
from saccade.parts.linear.both_ways import TwoWayMixer, read_all, weigh_all
from saccade.parts.linear.gated_unit import GatedUnit
from saccade.parts.linear.quadratic import quadratic
from saccade.parts.linear.short_long import ShortLongConv


@register
@dataclass(frozen=True, kw_only=True)
class Chela(TwoWayMixer):
    """long: tokens of the long kernel, 0 for none (default: the longest sequence of the shape, or 1024). short: widths of the short
    kernels. batch_norm: norms of the branches. narrow: channels of q and k (default: dim / 4). expand: channels of v in multiples of dim.
    bidirectional: read all tokens, with second kernels from the end."""

    long: int | None = None
    short: tuple[int, ...] = (3,)
    batch_norm: bool = True
    narrow: int | None = None
    expand: int = 2

    info = Info(
        slug="chela", phase="mixer", needs=frozenset({"training"}), tiny={"long": 24, "batch_norm": False},
        variants=(
            {"short": (3, 9), "batch_norm": False}, {"long": 0, "batch_norm": False, "narrow": 5},
            {"bidirectional": True, "batch_norm": False},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.long is not None and self.long < 0) or any(width < 1 for width in self.short) or not (self.long != 0 or self.short):
            raise ValueError(f"long={self.long}, short={self.short}: give at least one kernel, each of at least 1 token")
        if self.expand < 1 or (self.narrow is not None and self.narrow < 1):
            raise ValueError(f"expand={self.expand}, narrow={self.narrow}: give at least 1, or None for a narrow of a quarter of the width")

    def build(self, shape: MixerShape) -> TokenMixer:
        return ChelaMixer(shape, self)


class ChelaMixer(TokenMixer):
    """The layer: one head, whatever the shape has."""

    def __init__(self, shape: MixerShape, method: Chela) -> None:
        super().__init__(shape)
        d, self.bidirectional = shape.dim, method.bidirectional
        long = (shape.max_length or 1024) if method.long is None else method.long
        self.conv = ShortLongConv(d, long, method.short, method.batch_norm)
        self.back_conv = ShortLongConv(d, long, method.short, method.batch_norm) if method.bidirectional else None
        self.gated = GatedUnit(d, method.narrow or max(d // 4, 1), method.expand * d)
        self.norm = nn.RMSNorm(method.expand * d, eps=1e-6)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        context, tail = self.conv(x, past.get("tail"), int(call.start[0]))
        if self.back_conv is not None:
            context = context + self.back_conv(x.flip(1))[0].flip(1)
        q, k, v, gates = self._enter(x, context)
        if self.bidirectional:
            out, state = read_all(q, k, v, scale=1.0)
        else:
            out, state = scan(q, k, v, scale=1.0, initial_state=past.get("s"), return_state=call.keep)
        return self._leave(out, x, gates), {"tail": tail, "s": state} if call.keep and not self.bidirectional else {}

    def naive(self, x: Tensor) -> Tensor:
        context = self.conv.by_branch(x)
        if self.back_conv is not None:
            context = context + self.back_conv.by_branch(x.flip(1)).flip(1)
        q, k, v, gates = self._enter(x, context)
        out = weigh_all(q, k, v, scale=1.0)[0] if self.bidirectional else quadratic(q, k, v, scale=1.0)
        return self._leave(out, x, gates)

    def _enter(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        q, k, v, gates = self.gated.enter(x, F.silu(context))
        return q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), gates

    def _leave(self, out: Tensor, x: Tensor, gates: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(out.squeeze(1).to(wide), (out.shape[-1],), self.norm.weight.to(wide), 1e-6)
        return self.gated.leave(normed.to(x.dtype), x, gates)
