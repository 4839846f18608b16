"""Forget gates that may not fall below a bound which rises with depth (HGRN, HGRN-2): low layers forget fast, high ones remember.

    f = b + (1 - b) sigmoid(u),    b_l = sum of the shares p_1 ... p_l of softmax(p_0 ... p_{L-1})        b_0 = 0
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call
from saccade.parts.linear.gates import Gate, Gated


class LowerBound(nn.Module):
    """Bounds of the gates of `width` channels in layer `layer` of `layers`. Every layer learns the logits of its own bound."""

    def __init__(self, width: int, layer: int, layers: int) -> None:
        super().__init__()
        self.layer = layer
        self.logits = nn.Parameter(torch.zeros(layers, width)) if layer else None

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(log f, 1 - f) of u `(..., width)`, in float32 at least."""
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        if self.logits is None:
            return F.logsigmoid(u), (-u).sigmoid()
        shares = self.logits.to(u.dtype).log_softmax(0)
        bound, rest = shares[1 : self.layer + 1].logsumexp(0), torch.cat([shares[:1], shares[self.layer + 1 :]]).logsumexp(0)
        # rounding may lift a gate that is nearly 1 above it
        return torch.logaddexp(bound, rest + F.logsigmoid(u)).clamp(max=0), rest.exp() * (-u).sigmoid()


class LowerBoundGate(Gate):
    """The gate of HGRN-2: the keys `(B, H, N, F)` are its logits, and what is forgotten makes room for what is written, k = 1 - f."""

    def __init__(self, heads: int, features: int, layer: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.bound = LowerBound(heads * features, layer, layers)

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        log_decay, room = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.bound(keys.transpose(1, 2).flatten(2)))
        return Gated(log_decay, room.to(keys.dtype))
