"""Attention whose scores are a polynomial of q.k, in the direct form and in the form of moments (based, taylorshift, fast-factorizable).

    w_ij = c0 + c1 s + c2 s^2,   s = scale q_i . k_j,        o_i = sum_j w_ij v_j / sum_j w_ij

direct: the weights themselves, N^2 of them. factored: w_ij = phi(q_i) . phi(k_j) with F = 1 + D + D (D + 1) / 2 features, so that
`sum_j phi(k_j) (v_j, 1)^T` serves all queries. Features are made section by section and again in the backward pass: no more than D
numbers per token are kept for it, as the closed-form gradients of fast-factorizable do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.core import Call, MixerShape
from saccade.ops.scan import ScanState, scan
from saccade.ops.scan.chunked import CHUNK
from saccade.parts.linear.both_ways import BothWays, fold, unfold
from saccade.parts.linear.dropout import FeatureDropout
from saccade.parts.linear.features import FeatureMap
from saccade.parts.linear.normalise import Normaliser, RowSum, Together

Coefficients = tuple[float, float, float]
Form = Literal["auto", "direct", "factored"]


class Polynomial(FeatureMap):
    """`phi(q) . phi(k) = c0 + c1 s + c2 s^2` with s = q.k and coefficients (c0, c1, c2), none negative: Taylor2 with other weights.

    c2 = 0 leaves the products out. symmetric: each product of two channels once.
    """

    def __init__(self, coefficients: Coefficients = (1.0, 1.0, 0.5), symmetric: bool = True) -> None:
        super().__init__()
        if len(coefficients) != 3 or min(coefficients) < 0 or coefficients[0] == 0:
            raise ValueError(f"coefficients {coefficients} don't factorise: give (c0, c1, c2), none negative and c0 above 0")
        self.coefficients, self.symmetric = coefficients, symmetric

    def width(self, dim: int) -> int:
        if not self.coefficients[2]:
            return 1 + dim
        return 1 + dim + (dim * (dim + 1) // 2 if self.symmetric else dim * dim)

    def forward(self, x: Tensor) -> Tensor:
        c0, c1, c2 = (math.sqrt(c) for c in self.coefficients)
        features = [torch.full_like(x[..., :1], c0), c1 * x]
        if c2 and self.symmetric:
            # slices, as a gather of all pairs takes several times as long
            twice = math.sqrt(2) * c2 * x
            features += [c2 * x * x, *(x[..., i : i + 1] * twice[..., i + 1 :] for i in range(x.shape[-1] - 1))]
        elif c2:
            features.append(((c2 * x).unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2))
        return torch.cat(features, dim=-1)

    def score(self, s: Tensor) -> Tensor:
        """The polynomial itself, of s = q.k."""
        c0, c1, c2 = self.coefficients
        return c0 + s * (c1 + c2 * s)


def crossover(key_dim: int, value_dim: int, features: int, *, bidirectional: bool) -> int:
    """The length from which the factored form needs no more multiplications than the direct one.

    Both ways: `N^2 (D + Dv)` against `2 N F (Dv + 1)`, which for D = Dv and all D^2 products is close to D^2 + D + 1 (taylorshift).
    Causal: half as many pairs against the same and the products inside the scan's chunks of C tokens, `N C (F + Dv + 1)`.
    """
    moments = 2 * features * (value_dim + 1)
    if bidirectional:
        return math.ceil(moments / (key_dim + value_dim))
    return math.ceil(2 * (moments + CHUNK * (features + value_dim + 1)) / (key_dim + value_dim))


class PolynomialAttention(BothWays):
    """coefficients, symmetric: of the polynomial and its features. form: "auto" takes the direct form for sequences shorter than
    `crossover` that start here. after: a normaliser for what was read. dropout: on the features. scale: on q.k, default 1.

    The other arguments are those of Recurrent; feature maps and rotary embedding act before the polynomial.
    """

    section = 1024  # tokens whose features exist at a time
    rows = 512  # queries whose weights exist at a time, in the direct form

    def __init__(
        self, shape: MixerShape, *, coefficients: Coefficients = (1.0, 1.0, 0.5), symmetric: bool = True, form: Form = "factored",
        bidirectional: bool = False, after: Normaliser | None = None, dropout: float = 0.0, **options: Any,
    ) -> None:  # fmt: skip
        normaliser = RowSum() if after is None else Together(RowSum(), after)
        super().__init__(shape, bidirectional=bidirectional, normaliser=normaliser, **options)
        if form not in ("auto", "direct", "factored"):
            raise ValueError(f"form={form!r} is not 'auto', 'direct' or 'factored'")
        self.form, self.polynomial, self.dropout = form, Polynomial(coefficients, symmetric), FeatureDropout(dropout)

    @property
    def crossover(self) -> int:
        """Tokens from which "auto" takes the factored form."""
        width = self.polynomial.width(self.key_dim)
        return crossover(self.key_dim, self.value_dim, width, bidirectional=self.bidirectional)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        direct = not past and (self.form == "direct" or (self.form == "auto" and x.shape[1] < self.crossover))

        def recur(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ScanState | None]:
            dtype, (q, k, v) = q.dtype, _scaled(q, k, v, options["scale"])
            if direct:
                out = self._direct(q, k, v, call.real)
                state = self._moments(k, v, call) if call.keep and not self.bidirectional else None
            elif self.bidirectional:
                out, state = self._both_ways(q, k, v, call), None
            else:
                out, state = self._causal(q, k, v, call, ScanState(past["s"], past["z"]) if past else None)
            return out.to(dtype), state

        y, state, kept = self._run(x, past, call, recur)
        if state is not None and call.keep:
            kept["s"], kept["z"] = state
        return y, kept

    def naive(self, x: Tensor) -> Tensor:
        def recur(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
            dtype, (q, k, v) = q.dtype, _scaled(q, k, v, options["scale"])
            weights = self.polynomial.score(fold(q, k.shape[1]) @ k.mT)
            if not self.bidirectional:
                weights = unfold(weights, q.shape[2]).tril().unflatten(1, (k.shape[1], -1)).flatten(2, 3)
            return unfold(weights / weights.sum(-1, keepdim=True) @ v, q.shape[2]).to(dtype), None

        return self._run(x, {}, self.whole(x), recur)[0]

    # -- the forms ---------------------------------------------------------------------------------------------------------

    def features_of(self, x: Tensor) -> Tensor:
        return self.dropout(self.polynomial(x))

    def _direct(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        outs, n = [], q.shape[2]
        for begin in range(0, n, self.rows):
            end = min(begin + self.rows, n)
            seen = n if self.bidirectional else end
            weights = unfold(self.polynomial.score(fold(q[:, :, begin:end], k.shape[1]) @ k[:, :, :seen].mT), end - begin)
            if not self.bidirectional:
                weights = weights.tril(begin)
            if real is not None:
                weights = weights * real[:, None, None, :seen]
            total = weights.sum(-1, keepdim=True)
            outs.append(unfold(fold(weights, k.shape[1]) @ v[:, :, :seen], end - begin) / total)
        return torch.cat(outs, dim=2)

    def _causal(self, q: Tensor, k: Tensor, v: Tensor, call: Call, state: ScanState | None) -> tuple[Tensor, ScanState]:
        def part(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, s: Tensor | None, z: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            before = None if s is None or z is None else ScanState(s, z)
            phi = self.features_of(k) * seen
            out, after = scan(self.features_of(q), phi, v, scale=1.0, normalise="sum", initial_state=before, impl=self.impl)
            assert isinstance(after, ScanState)
            return out, after.s, after.z

        outs, s, z = [], None if state is None else state.s, None if state is None else state.z
        for parts in self._sections(q, k, v, call):
            out, s, z = _again(part, *parts, s, z)
            outs.append(out)
        assert s is not None and z is not None
        return torch.cat(outs, dim=2), ScanState(s, z)

    def _both_ways(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        def read(q: Tensor, total: Tensor) -> Tensor:
            out = unfold(fold(self.features_of(q), total.shape[1]) @ total, q.shape[2])
            return out[..., :-1] / out[..., -1:]

        total = self._sums(k, v, call)
        return torch.cat([_again(read, part, total) for part in q.split(self.section, dim=2)], dim=2)

    def _sums(self, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """`sum_j phi(k_j) (v_j, 1)^T`, `(B, Hk, F, Dv + 1)`."""

        def part(k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
            return (self.features_of(k) * seen).mT @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)

        return torch.stack([_again(part, *parts[1:]) for parts in self._sections(k, k, v, call)]).sum(0)

    def _moments(self, k: Tensor, v: Tensor, call: Call) -> ScanState:
        """What the scan would have kept: one state for every query head."""
        total = self._sums(k, v, call).repeat_interleave(self.heads // self.kv_heads, dim=1)
        return ScanState(total[..., :-1], total[..., -1])

    def _sections(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> list[tuple[Tensor, ...]]:
        seen = torch.ones_like(k[:1, :1, :, :1]) if call.real is None else call.real[:, None, :, None].to(k.dtype)
        return list(zip(*(x.split(self.section, dim=2) for x in (q, k, v, seen)), strict=True))


def _scaled(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale), k.to(wide), v.to(wide)


def _again(run: Callable[..., Any], *given: Tensor | None) -> Any:
    """run(*given), whose inner tensors are made again in the backward pass."""
    return checkpoint(run, *given, use_reentrant=False) if torch.is_grad_enabled() else run(*given)
