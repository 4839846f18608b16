"""LightNet: linear attention with an additive recurrence, a running normaliser in the place of a decay, so that one scan serves any order.

    q = silu(W_q x),  k = W_k x (logits),  v = W_v x,     Z_t = log sum_{s<=t} exp(k_s)   per channel
    S_t = e^(Z_{t-1} - Z_t) S_{t-1} + e^(k_t - Z_t) v_t^T
    y_t = W_o (silu(W_2 W_1 x_t) * norm(S_t^T q_t)),    W_1, W_2 of rank 128

so that every channel of S is the mean of the values under a softmax over the tokens so far. With `bidirectional=True` the softmax is over
all tokens, whose order then does not matter, and positions come from MD-LRPE (`lrpe`: q and keys doubled by cosine and sine, the channels
parted among the axes of `grid`) and MD-TPE (`toeplitz`: an exponential Toeplitz product along each axis of the input, meant for the first
layer only; the paper says little of it, this is the simplest that fits).

Source: lightnet, arXiv 2405.21022.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.gates import Gated
from saccade.parts.linear.lrpe import Lrpe
from saccade.parts.linear.normalise import OutputNorm
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.toeplitz import ExponentialToeplitz
from saccade.parts.linear.two_softmaxes import token_softmax


@register
@dataclass(frozen=True, kw_only=True)
class LightNet(TwoWayMixer):
    """rank: of the output gate. lrpe, toeplitz: positions, see above. grid: sizes of the axes of an image or video whose places the tokens
    are, the last axis fastest; only with bidirectional=True, and with exactly as many tokens where toeplitz is on. The paper's heads have
    128 channels."""

    rank: int = 128
    lrpe: bool = False
    toeplitz: bool = False
    grid: tuple[int, ...] = ()

    info = Info(
        slug="lightnet", phase="mixer", needs=frozenset({"training"}), tiny={"rank": 8},
        variants=(
            {"rank": 8, "lrpe": True, "toeplitz": True}, {"bidirectional": True, "toeplitz": True},
            {"bidirectional": True, "lrpe": True, "grid": (10, 3)},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank={self.rank}: give at least 1")
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.grid and not self.bidirectional:
            raise ValueError(f"grid={self.grid}: an image has no order to be causal in, add bidirectional=True")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LightNetMixer(shape, self)


class LightNetMixer(BothWays):
    """The layer; with MD-TPE its projections read the mixed tokens, its output gate the tokens themselves."""

    def __init__(self, shape: MixerShape, method: LightNet) -> None:
        super().__init__(
            shape, bidirectional=method.bidirectional, q_map="silu", gate=token_softmax(method.bidirectional),
            normaliser=OutputNorm(shape.heads, shape.head_dim),
            out_gate=OutputGate(shape.dim, shape.heads * shape.head_dim, "silu", method.rank),
        )  # fmt: skip
        self.lrpe = Lrpe(shape.kv_heads, shape.head_dim, method.grid) if method.lrpe else None
        self.toeplitz = ExponentialToeplitz(shape.dim, method.grid, method.bidirectional) if method.toeplitz else None

    def project(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        if self.toeplitz is None:
            return super().project(x, past, call)
        x, mixed = self.toeplitz(x, past, call)
        q, k, v, kept = super().project(x, past, call)
        return q, k, v, kept | mixed

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q, k = super().features(q, k, call)
        return q if self.lrpe is None else self.lrpe(q, call.positions), k

    def write(self, x: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Gated, Tensor, Tensor | None]:
        gated, v, beta = super().write(x, k, v, past, call)
        if self.lrpe is None:
            return gated, v, beta
        # positions act on the normalised keys, cosine and sine of a channel decay alike
        decay = gated.log_decay if gated.log_decay is None else torch.cat([gated.log_decay] * 2, dim=-1)
        return Gated(decay, self.lrpe(gated.keys, call.positions), gated.carry), v, beta
