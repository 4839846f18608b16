"""A gate that reads a layer's input and says which tokens are worth keeping, head by head.

    Q' = X W_q, K' = X W_k, V' = X W_v        a few narrow heads, no positions
    p = sigmoid([softmax(Q' K'^T / sqrt(d)) V'] W_o + b)        causal, one column a key/value head

Causal, so that a token is judged by what has come so far and a prompt in chunks is judged as at once. Source: attention-gate, arXiv
2410.12876, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops import attend


class TokenGate(NamedTuple):
    """w_q, w_k, w_v `(heads, C, d)`; w_o `(heads * d, Hk)`; bias `(Hk,)`."""

    w_q: Tensor
    w_k: Tensor
    w_v: Tensor
    w_o: Tensor
    bias: Tensor

    @classmethod
    def read(cls, tensor: Callable[[str], Tensor]) -> TokenGate:
        """From named tensors, such as those of a plan."""
        return cls(*(tensor(name) for name in cls._fields))

    @classmethod
    def new(cls, width: int, kv_heads: int, *, heads: int, dim: int, bias: float, generator: torch.Generator) -> TokenGate:
        """A gate that says nearly the same of all tokens: p is close to sigmoid(bias). Queries and keys begin equal and large, so that a
        token looks at itself and its like first; otherwise it would be one of n in a mean."""
        shapes = [(heads, width, dim)] * 2 + [(heads * dim, kv_heads)]
        alike, v, o = (torch.randn(shape, generator=generator) * shape[-2] ** -0.5 for shape in shapes)
        return cls(1.5 * alike, 1.5 * alike, v, 0.1 * o, torch.full((kv_heads,), bias))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q', K', V' `(B, heads, m, d)` of a layer's inputs x `(B, m, C)`, each input scaled to mean square 1; in float32 or float64."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w.to(x.device, x.dtype)) for w in (self.w_q, self.w_k, self.w_v))
        return q, k, v

    def logits(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """logit of p, `(B, Hk, m)`, of the newest m tokens: q `(B, heads, m, d)` over k, v `(B, heads, n, d)`."""
        out = attend(q, k, v).out.transpose(1, 2).flatten(2)
        return (out @ self.w_o.to(out.device, out.dtype) + self.bias.to(out.device, out.dtype)).transpose(1, 2)
