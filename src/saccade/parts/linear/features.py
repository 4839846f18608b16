"""Feature maps: what linear attention puts in the place of the exponential.

A map acts on the last axis of `(B, H, N, D)` and gives `(B, H, N, F)`; `width(D)` is F. Scores are `phi(q) . phi(k)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureMap(nn.Module):
    """Keeps the width unless it says otherwise."""

    def width(self, dim: int) -> int:
        return dim


class Pointwise(FeatureMap):
    """The same function on every channel."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Power(FeatureMap):
    """Focused maps: `|x| x^p / |x^p|` of relu(x), which turns x towards its largest channels and keeps its length (flatten)."""

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.power, self.eps = power, eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() + self.eps
        raised = (x / x.amax(-1, keepdim=True)) ** self.power
        return raised * (x.norm(dim=-1, keepdim=True) / raised.norm(dim=-1, keepdim=True))


class Exponential(FeatureMap):
    """`exp(alpha x)`, the largest channel of a query taken off where `per_token`, which a normalised read cancels (linear-log-normal)."""

    def __init__(self, alpha: float = 1.0, per_token: bool = False) -> None:
        super().__init__()
        self.alpha, self.per_token = alpha, per_token

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha * x
        return (x - x.amax(-1, keepdim=True).detach() if self.per_token else x).exp()


class Taylor2(FeatureMap):
    """`phi(q) . phi(k) = 1 + s + s^2 / 2` with `s = scale q.k`: 1, x, and all products of two channels (based, taylorshift).

    scale: default `D ** -0.5`. symmetric: each product once, those of two channels weighted by sqrt 2: 1 + D + D (D + 1) / 2 features
    in place of 1 + D + D^2.
    """

    def __init__(self, scale: float | None = None, symmetric: bool = True) -> None:
        super().__init__()
        self.scale, self.symmetric = scale, symmetric

    def width(self, dim: int) -> int:
        return 1 + dim + (dim * (dim + 1) // 2 if self.symmetric else dim * dim)

    def forward(self, x: Tensor) -> Tensor:
        d = x.shape[-1]
        x = x * math.sqrt(d**-0.5 if self.scale is None else self.scale)
        if self.symmetric:
            i, j = torch.triu_indices(d, d, device=x.device)
            weight = torch.where(i == j, math.sqrt(0.5), torch.ones((), dtype=x.dtype, device=x.device))
            squares = x[..., i] * x[..., j] * weight
        else:
            squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * math.sqrt(0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x, squares], dim=-1)


class Hedgehog(FeatureMap):
    """A learned map per head, both signs: `[f(W x + b), f(-(W x + b))]`, W the identity at first (hedgehog).

    f: "softmax" over each half (stable, the form in use) or "exp". features: rows of W (default D). floor: smallest feature.
    """

    def __init__(
        self, heads: int, dim: int, features: int | None = None, activation: str = "softmax", bias: bool = False, floor: float = 1e-12
    ) -> None:
        super().__init__()
        if activation not in ("softmax", "exp"):
            raise ValueError(f"activation {activation!r} of a hedgehog map is not known: use 'softmax' or 'exp'")
        self.features, self.activation, self.floor = features or dim, activation, floor
        self.weight = nn.Parameter(torch.eye(self.features, dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, self.features)) if bias else None

    def width(self, dim: int) -> int:
        return 2 * self.features

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.mT
        y = y if self.bias is None else y + self.bias
        if self.activation == "exp":
            return torch.cat([y.exp(), (-y).exp()], dim=-1)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1).clamp(min=self.floor)


class Chain(FeatureMap):
    """One map after the other."""

    def __init__(self, *maps: FeatureMap) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)

    def width(self, dim: int) -> int:
        for one in self.maps:
            dim = cast(FeatureMap, one).width(dim)
        return dim

    def forward(self, x: Tensor) -> Tensor:
        for one in self.maps:
            x = one(x)
        return x


def unit(x: Tensor) -> Tensor:
    """x divided by its length; 0 stays 0."""
    # the root's slope at 0 has no value, a sum of squares below this number changes nothing else
    d = x.shape[-1]
    return F.rms_norm(x, (d,), eps=1e-12 / d) * d**-0.5  # one kernel, where squares and their sum would be four


def squashed_exp(x: Tensor) -> Tensor:
    """`elu(x) + 1`."""
    return F.elu(x) + 1


_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "elu+1": squashed_exp, "relu": torch.relu, "silu": F.silu, "softmax": lambda x: x.softmax(-1), "unit": unit,
}  # fmt: skip
_LEARNED = ("exp", "taylor2", "power", "hedgehog")


def feature_map(name: str, heads: int = 1, dim: int = 1, **options: object) -> FeatureMap:
    """A map by its name: "identity", "elu+1", "relu", "silu", "softmax" (over the channels), "unit" (length 1), "exp", "taylor2", "power",
    "hedgehog" (needs heads and dim); several joined by `|`, such as "silu|unit", act one after another. options go to the last one."""
    *first, last = name.split("|")
    if first:
        return Chain(*(feature_map(one, heads, dim) for one in first), feature_map(last, heads, dim, **options))
    if name in _POINTWISE:
        return Pointwise(_POINTWISE[name])
    if name == "hedgehog":
        return Hedgehog(heads, dim, **options)  # pyright: ignore[reportArgumentType]
    made = {"exp": Exponential, "taylor2": Taylor2, "power": Power}.get(name)
    if made is None:
        raise ValueError(f"feature map {name!r} is not known: use one of {', '.join((*_POINTWISE, *_LEARNED))}, joined by | if several")
    return made(**options)  # pyright: ignore[reportCallIssue]
