"""InfSA: attention as a graph of tokens whose weights add up over paths of all lengths, or its main direction alone in linear time.

    A = relu(Q K^T) / (|relu(Q K^T)|_F + eps),   q and k divided by D^1/2,   gamma = sigmoid(c) per head
    closure: C = sum_{t >= 1} (gamma A)^t = (I - gamma A)^-1 - I,    o = C V
    pure:    o = rho A V                                              (more hops come from more layers)
    linear:  qbar = sum_t |q_t| q_t / (sum |q| + eps),   a_j = relu(qbar.k_j) / (sum_j relu(qbar.k_j) + eps),   o_i = rho sum_j a_j v_j

The linear form follows the dominant direction of A and gives every token the same output. It takes two passes and O(D) numbers a head.
rho is learned per head, a sigmoid that starts at 0.95.

Source: infsa, arXiv 2603.00175.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.pointwise import pointwise_read
from saccade.parts.linear.two_way import TwoWay


@register
@dataclass(frozen=True, kw_only=True)
class InfSA(Mixer):
    """form: "linear" (pooled query), "pure" (one hop of A, quadratic time) or "closure" (all paths, cubic time). rho: discount at first,
    between 0 and 1: of the output in the first two forms, of a hop (gamma) in the last. eps: added to both norms."""

    form: Literal["linear", "pure", "closure"] = "linear"
    rho: float = 0.95
    eps: float = 1e-6

    info = Info(
        slug="infsa", phase="mixer", needs=frozenset({"training"}), causality="bidirectional",
        variants=({"form": "pure"}, {"form": "closure", "rho": 0.8}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.form not in ("linear", "pure", "closure"):
            raise ValueError(f"form={self.form!r} is not 'linear', 'pure' or 'closure'")
        if not 0 < self.rho < 1 or self.eps < 0:
            raise ValueError(f"rho={self.rho}, eps={self.eps}: give a rho between 0 and 1 and an eps of at least 0")

    def build(self, shape: MixerShape) -> TokenMixer:
        return InfSAMixer(shape, self)


def token_graph(q: Tensor, k: Tensor, eps: float = 1e-6) -> Tensor:
    """A `(B, H, N, N)` of q, k `(B, H, N, D)`, which are divided by the root of D here."""
    raw = (q @ k.mT / q.shape[-1]).relu()
    return raw / (torch.linalg.matrix_norm(raw, keepdim=True) + eps)


def all_paths(a: Tensor, gamma: Tensor | float) -> Tensor:
    """C = (I - gamma A)^-1 - I: each pair's discounted paths. C times ones is Katz centrality, C + I the expected visits of the chain
    gamma A, which ends in row i with probability `1 - gamma sum_j A_ij`. A `(..., N, N)` with gamma times its norm below 1."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(eye - gamma * a, gamma * a)


class InfSAMixer(TwoWay):
    """The layer. discount `(H, 1, 1)`: the logit of rho, or of gamma."""

    def __init__(self, shape: MixerShape, method: InfSA) -> None:
        super().__init__(shape)
        self.method = method
        self.discount = nn.Parameter(torch.full((shape.heads, 1, 1), math.log(method.rho / (1 - method.rho))))

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        assert self.k_proj is not None
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        rho, eps = self.discount.to(q.dtype).sigmoid(), self.method.eps
        if self.method.form == "linear":
            weights = self.shares(q, k)
            # the context is one for all tokens
            return self.o_proj(self.joined(rho * (weights @ v), x)).expand(-1, x.shape[1], -1), {}
        if self.method.form == "pure":
            scale, ones = 1 / q.shape[-1], torch.ones_like(v[..., :1])
            out = pointwise_read(q, k, v, lambda s, top: s.relu(), scale=scale)
            squares = pointwise_read(q, k, ones, lambda s, top: s.relu().square(), scale=scale).sum(2, keepdim=True)
            # a graph without any edge has no norm to take the slope of
            return self.o_proj(self.joined(rho * out / (squares.clamp(min=1e-30).sqrt() + eps), x)), {}
        return self.o_proj(self.joined(all_paths(token_graph(q, k, eps), rho) @ v, x)), {}

    def shares(self, q: Tensor, k: Tensor) -> Tensor:
        """a `(B, H, 1, N)`: the part that each token has in the context."""
        q, k = q * q.shape[-1] ** -0.5, k * k.shape[-1] ** -0.5
        lengths = q.norm(dim=-1, keepdim=True)
        pooled = (lengths * q).sum(2, keepdim=True) / (lengths.sum(2, keepdim=True) + self.method.eps)
        raw = (pooled @ k.mT).relu()
        return raw / (raw.sum(-1, keepdim=True) + self.method.eps)

    def naive(self, x: Tensor) -> Tensor:
        assert self.k_proj is not None
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        rho, n = self.discount.to(q.dtype).sigmoid(), x.shape[1]
        if self.method.form == "linear":
            d = q.shape[-1]
            share = (q / d**0.5).norm(dim=-1) / ((q / d**0.5).norm(dim=-1).sum(-1, keepdim=True) + self.method.eps)
            raw = torch.einsum("bhi,bhid,bhjd->bhj", share, q / d**0.5, k / d**0.5).relu()
            weights = rho * (raw / (raw.sum(-1, keepdim=True) + self.method.eps)).unsqueeze(2).expand(-1, -1, n, -1)
        elif self.method.form == "pure":
            weights = rho * token_graph(q, k, self.method.eps)
        else:
            eye = torch.eye(n, dtype=q.dtype, device=q.device)
            weights = torch.linalg.inv(eye - rho * token_graph(q, k, self.method.eps)) - eye
        return self.o_proj(self.joined(weights @ v, x))
