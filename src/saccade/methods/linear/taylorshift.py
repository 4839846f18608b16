"""TaylorShift: Taylor softmax of normalised queries and keys, evaluated pair by pair or through moments, whichever is cheaper.

    q_i <- tau_h q_i / |q_i|,   k_j <- k_j / |k_j|,   s = q_i . k_j
    w_ij = a s^2 + b s + c  (1/2, 1, 1),     o_i = sum_j w_ij v_j / sum_j w_ij

direct: N^2 weights. factored (the paper's "efficient"): `phi(Q) (phi(K)^T (V, 1))` with the products of two channels as features. The
shift between the two stands at `crossover`, close to N0 = D^2 + D + 1 with all D^2 products, and near half of that where each product
is kept once, as here by default. The paper's powers of D^(1/4) and its division of V by N keep half precision in range and cancel;
moments are held in float32 here. The paper reads all tokens (`bidirectional=True`); causal, the moments are a running state.

Source: taylorshift, arXiv 2403.02920.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.core import Call, Info, MixerShape, TokenMixer, register
from saccade.parts.linear.both_ways import TwoWayMixer
from saccade.parts.linear.counts import CountPower
from saccade.parts.linear.polynomial import Form, PolynomialAttention


@register
@dataclass(frozen=True, kw_only=True)
class TaylorShift(TwoWayMixer):
    """form: "auto" (by the length), "direct" or "factored"; a sequence that goes on from a state is factored. a, b, c: the polynomial, a
    above 0 and c at least b^2 / (4 a), so that no weight is negative. rescale: multiply what n tokens gave by sqrt(n / D).
    symmetric: keep each product of two channels once."""

    form: Form = "auto"
    a: float = 0.5
    b: float = 1.0
    c: float = 1.0
    rescale: bool = False
    symmetric: bool = True

    info = Info(
        slug="taylorshift", phase="mixer", needs=frozenset({"training"}), tiny={"form": "factored"},
        variants=(
            {"rescale": True}, {"form": "factored", "bidirectional": True, "rescale": True},
            {"form": "direct", "bidirectional": True, "symmetric": False, "a": 1.0},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a <= 0 or self.b < 0 or 4 * self.a * self.c < self.b**2:
            raise ValueError(f"a={self.a}, b={self.b}, c={self.c}: give a above 0, b at least 0 and c at least b^2 / (4 a)")
        if self.form not in ("auto", "direct", "factored"):
            raise ValueError(f"form={self.form!r} is not 'auto', 'direct' or 'factored'")

    def build(self, shape: MixerShape) -> TokenMixer:
        after = CountPower(0.5, shape.head_dim**-0.5, self.bidirectional) if self.rescale else None
        return TaylorShiftMixer(
            shape, coefficients=(self.c, self.b, self.a), symmetric=self.symmetric, form=self.form, bidirectional=self.bidirectional,
            after=after, q_map="unit", k_map="unit",
        )  # fmt: skip


class TaylorShiftMixer(PolynomialAttention):
    """Queries of length tau, learned per head, 1 at first."""

    def __init__(self, shape: MixerShape, **options) -> None:
        super().__init__(shape, **options)
        self.tau = nn.Parameter(torch.ones(shape.heads, 1, 1))

    def features(self, q: Tensor, k: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        q, k = super().features(q, k, call)
        return q * self.tau, k
