"""FAST: the polynomial sum_{l<=p} x^l / l! of normalised q.k in the place of the exponential, which factorises into moments.

    x_ij = q_i . k_j / temperature,   q and k normalised per token
    w_ij = a0 + a1 x + a2 x^2  (1, 1, 1/2),     o_i = sum_j w_ij v_j / sum_j w_ij
         = phi(q_i) F / phi(q_i) G,   F = sum_j phi(k_j) v_j^T,  G = sum_j phi(k_j),   O(N D^(p+1))

The moments are symmetric: D (D + 1) / 2 of order two are kept. Features are made again in the backward pass, so that memory stays
O(N D). Order 1 has negative weights where x < -1; with the default temperature, the largest that |q.k| can be, there are none.

Source: fast-factorizable, arXiv 2402.07901.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import TwoWayMixer
from saccade.parts.linear.polynomial import PolynomialAttention

Norm = Literal["standard", "largest"]


@register
@dataclass(frozen=True, kw_only=True)
class FastFactorizable(TwoWayMixer):
    """order: p, 1 or 2. norm: of q and k over the channels of a token, after their mean was taken off: "standard" (variance 1, the paper)
    or "largest" (divided by the largest length among the head's tokens, so bidirectional only). temperature: of q.k; default: its
    bound, head_dim for "standard" and 1 for "largest". dropout: on the features, in training."""

    order: Literal[1, 2] = 2
    norm: Norm = "standard"
    temperature: float | None = None
    dropout: float = 0.0

    info = Info(
        slug="fast-factorizable", phase="mixer", needs=frozenset({"training"}),
        variants=({"order": 1}, {"temperature": 3.0}, {"bidirectional": True, "norm": "largest"}, {"bidirectional": True, "order": 1}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2):
            raise ValueError(f"order={self.order}: give 1 or 2")
        if self.norm not in ("standard", "largest"):
            raise ValueError(f"norm={self.norm!r} is not 'standard' or 'largest'")
        if self.norm == "largest" and not self.bidirectional:
            raise ValueError("norm='largest' looks at all tokens of a head: use 'standard', or bidirectional=True")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: give a positive number, or None for the bound of q.k")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: give a probability from 0 to below 1")

    def build(self, shape: MixerShape) -> TokenMixer:
        bound = shape.head_dim if self.norm == "standard" else 1.0
        return FastMixer(
            shape, self.norm, coefficients=(1.0, 1.0, 0.5 if self.order == 2 else 0.0), bidirectional=self.bidirectional,
            dropout=self.dropout, scale=1 / (self.temperature or bound),
        )  # fmt: skip


class FastMixer(PolynomialAttention):
    """Queries and keys normalised by `norm` before the polynomial."""

    def __init__(self, shape: MixerShape, norm: Norm, **options) -> None:
        super().__init__(shape, **options)
        self.norm = norm

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        return self._normalised(q, call), self._normalised(k, call)

    def _normalised(self, x: Tensor, call: Call) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        if self.norm == "standard":
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        longest = call.masked(x.square().sum(-1, keepdim=True)).amax(2, keepdim=True)
        return x * (longest + torch.finfo(x.dtype).tiny).rsqrt()
