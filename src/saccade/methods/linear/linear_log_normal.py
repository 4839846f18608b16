"""Linear log-normal attention: exponential features whose spread is matched to softmax's, averaged with softmax inside blocks.

    LLN:   o_i = phi_q(q_i) sum_j phi_k(k_j) v_j^T / phi_q(q_i) sum_j phi_k(k_j),   phi_q(q) = exp(alpha q),  phi_k(k) = exp(beta k)
    match: s2 = var(q) var(k),   t2 = max((s2 - b) / a, eps),   alpha = sqrt(t2 / 2) / std(q),   beta = sqrt(t2 / 2) / std(k)
    LLN+Diag: (LLN + softmax attention inside blocks of tokens) / 2

a and b are fitted once per width of a head (`parts.linear.log_normal`). The largest entry of a query and the largest key so far are taken
off before the exponential and cancel. With `bidirectional=True`, as in the paper, the variances are those of each sequence. Causal, they
would see the future, so alpha and beta are buffers: they start as for variances of 1, and `measure` sets them from tokens. No gradient
passes through the variances.

Source: linear-log-normal, arXiv 2311.13541.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.blocks import attend_blocks, block_oracle
from saccade.parts.linear.both_ways import BothWays, TwoWayMixer
from saccade.parts.linear.gates import Gated
from saccade.parts.linear.log_normal import matched, spread
from saccade.parts.linear.normalise import RowSum
from saccade.parts.linear.running_max import RunningMaxGate


@register
@dataclass(frozen=True, kw_only=True)
class LinearLogNormal(TwoWayMixer):
    """block: tokens of a block of the local half, 0 for LLN alone."""

    block: int = 128

    info = Info(
        slug="linear-log-normal", phase="mixer", needs=frozenset({"training"}), tiny={"block": 16},
        variants=({"block": 0}, {"bidirectional": True, "block": 16}, {"bidirectional": True, "block": 0}),
        opts_out={"gradcheck": "no gradient passes through the variances, which differences see"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 0:
            raise ValueError(f"block={self.block}: give a number of tokens, 0 for no blocks")

    def build(self, shape: MixerShape) -> TokenMixer:
        return LogNormalMixer(shape, self)


class LogNormalMixer(BothWays):
    """The layer. alpha `(H,)` and beta `(Hk,)`: what causal layers use."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, shape: MixerShape, method: LinearLogNormal) -> None:
        super().__init__(shape, bidirectional=method.bidirectional, gate=RunningMaxGate(method.bidirectional), normaliser=RowSum())
        self.block = method.block
        alpha, beta = matched(torch.ones(shape.heads), torch.ones(shape.kv_heads), shape.head_dim)
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)

    @torch.no_grad()
    def measure(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Match alpha and beta to the queries and keys of tokens x `(B, N, dim)`; valid: `(B, N)` bool, False at padding."""
        q, k, _, _ = self.project(x, {}, self.whole(x))
        alpha, beta = matched(spread(q, valid, True), spread(k, valid, True), self.key_dim)
        self.alpha.copy_(alpha)
        self.beta.copy_(beta)

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        alpha, beta = self.alpha, self.beta
        if self.bidirectional:
            alpha, beta = matched(spread(q.detach(), call.real, False), spread(k.detach(), call.real, False), self.key_dim)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide) * alpha.to(wide)[..., None, None], k.to(wide) * beta.to(wide)[..., None, None]
        return (q - q.detach().amax(-1, keepdim=True)).exp(), k

    def write(self, x: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Gated, Tensor, Tensor | None]:
        gated, v, beta = super().write(x, k, v, past, call)
        return gated, v.to(gated.keys.dtype), beta

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        y, kept = super().mix(x, past.get("lln", {}), call)
        if not self.block:
            return y, {"lln": kept}
        q, k, v, _ = self.project(x, {}, call)
        local, held = attend_blocks(q, k, v, past.get("diag", {}), call, block=self.block, bidirectional=self.bidirectional)
        return (y + self.finish(local, x)) / 2, {"lln": kept, "diag": held}

    def naive(self, x: Tensor) -> Tensor:
        y = super().naive(x)
        if not self.block:
            return y
        q, k, v, _ = self.project(x, {}, self.whole(x))
        return (y + self.finish(block_oracle(q, k, v, block=self.block, bidirectional=self.bidirectional), x)) / 2
