"""SOFT, softmax-free linear attention: a Gaussian kernel with Q = K, through a few landmarks and an inverse made of products.

    q = W_q x / D^1/4,   S_ij = exp(-|q_i - q_j|^2 / 2)                                       (symmetric, 1 on the diagonal)
    Qm = gelu(layer_norm(conv_r(q)))                              landmarks: one of every r x r tokens of the image, per head
    P1 = S(Q, Qm),   P2 = S(Qm, Qm) + ridge I,    o = P1 (P2^-1 (P1^T V)),    y = W_o (o + conv_3x3(v))

The inverse is Newton's (`newton_inverse`). normalised (SOFT++): D^-1/2 P2^-1 D^-1/2 in its place, D the row sums of P2, which bounds the
spectrum. With r = 1 all of S is read. Rows do not sum to 1.

Source: soft, arXiv 2207.03341.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.grid import Grid, GridConv, as_map, check_grid, check_kernel, image_grid
from saccade.parts.linear.newton import newton_inverse
from saccade.parts.linear.pointwise import pointwise_read
from saccade.parts.linear.two_way import TwoWay


@register
@dataclass(frozen=True, kw_only=True)
class Soft(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. ratio: r; 1 for all of S.
    steps: of Newton's iteration. ridge: on the landmarks' kernel. normalised: SOFT++. kernel: width of the convolution on the values in
    tokens, 0 for none."""

    grid: tuple[int, int] | None = None
    ratio: int = 8
    steps: int = 20
    ridge: float = 0.01
    normalised: bool = False
    kernel: int = 3

    info = Info(
        slug="soft", phase="mixer", needs=frozenset({"training"}), causality="bidirectional",
        # the definition holds the finished inverse, which takes more steps than the paper's 20
        tiny={"grid": (0, 8), "ratio": 2, "steps": 40},
        variants=({"grid": (0, 5), "ratio": 3, "steps": 40, "normalised": True, "kernel": 0}, {"ratio": 1, "grid": (0, 8)}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)
        if self.ratio < 1 or self.steps < 1 or self.ridge < 0:
            raise ValueError(f"ratio={self.ratio}, steps={self.steps}, ridge={self.ridge}: give at least 1, 1 and 0")

    def build(self, shape: MixerShape) -> TokenMixer:
        return SoftMixer(shape, self)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    """`exp(-|a_i - b_j|^2 / 2)`, `(..., N, M)` of a `(..., N, D)` and b `(..., M, D)`."""
    half = a.square().sum(-1, keepdim=True) / 2, b.square().sum(-1, keepdim=True).mT / 2
    # rounding must not make a distance negative
    return (a @ b.mT - half[0] - half[1]).clamp(max=0).exp()


def landmark_read(q: Tensor, landmarks: Tensor, v: Tensor, *, ridge: float = 0.01, steps: int = 20, normalised: bool = False) -> Tensor:
    """`P1 (P2^-1 (P1^T V))` `(B, H, N, D)` of q, v `(B, H, N, D)` and landmarks `(B, H, m, D)`."""
    return gaussian(q, landmarks) @ (middle(landmarks, ridge, normalised, steps) @ (gaussian(landmarks, q) @ v))


def middle(landmarks: Tensor, ridge: float, normalised: bool, steps: int | None = None) -> Tensor:
    """The inverse between, `(B, H, m, m)`: by so many of Newton's steps, or exact with None.

    In float32 at least, under autocast too: products of half precision leave no inverse.
    """
    with torch.autocast(landmarks.device.type, enabled=False):
        a = landmarks.to(torch.promote_types(landmarks.dtype, torch.float32))
        p = gaussian(a, a) + ridge * torch.eye(a.shape[2], dtype=a.dtype, device=a.device)
        inverse = torch.linalg.inv(p) if steps is None else newton_inverse(p, steps)
        if normalised:
            root = p.sum(-1, keepdim=True).rsqrt()
            inverse = root * inverse * root.mT
    return inverse.to(landmarks.dtype)


class SoftMixer(TwoWay):
    """The layer."""

    def __init__(self, shape: MixerShape, method: Soft) -> None:
        super().__init__(shape, shared=True)
        self.method, d, r = method, shape.head_dim, method.ratio
        self.local = GridConv(self.width, method.kernel) if method.kernel else None
        self.sampler = nn.Conv2d(d, d, r, stride=r) if r > 1 else None
        self.sampler_norm = nn.LayerNorm(d) if r > 1 else None

    def places(self, n: int) -> Grid:
        """The map of n tokens, where something needs it."""
        return (1, n) if self.local is None and self.sampler is None else image_grid(n, self.method.grid)

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.q_proj(x)) * self.shape.head_dim**-0.25

    def landmarks(self, q: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """`(B, H, m, D)` of q `(B, H, N, D)`; a side that is no multiple of the ratio is filled up with zeros."""
        assert self.sampler is not None and self.sampler_norm is not None
        image = as_map(q.flatten(0, 1).to(x.dtype), grid)
        sides = [-side % self.method.ratio for side in grid]
        found = self.sampler(F.pad(image, (0, sides[1], 0, sides[0]))).flatten(2).mT
        return F.gelu(self.sampler_norm(found)).to(q.dtype).unflatten(0, (-1, self.heads))

    def finish(self, out: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        y = self.joined(out, x)
        return self.o_proj(y if self.local is None else y + self.local(v, grid))

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        grid, q, v = self.places(x.shape[1]), self.queries(x), self.v_proj(x)
        method, values = self.method, self.split(v)
        if self.sampler is None:
            # the exponents of both lengths become two more channels of a product
            half, one = q.square().sum(-1, keepdim=True) / -2, torch.ones_like(q[..., :1])
            rows, keys = torch.cat([q, half, one], -1), torch.cat([q, one, half], -1)
            out = pointwise_read(rows, keys, values, lambda s, top: s.clamp(max=0).exp(), scale=1.0)
        else:
            out = landmark_read(
                q, self.landmarks(q, x, grid), values, ridge=method.ridge, steps=method.steps, normalised=method.normalised
            )
        return self.finish(out, v, x, grid), {}

    def naive(self, x: Tensor) -> Tensor:
        grid, q, v = self.places(x.shape[1]), self.queries(x), self.v_proj(x)
        if self.sampler is None:
            weights = gaussian(q, q)
        else:
            marks = self.landmarks(q, x, grid)
            weights = gaussian(q, marks) @ middle(marks, self.method.ridge, self.method.normalised) @ gaussian(marks, q)
        return self.finish(weights @ self.split(v), v, x, grid)
