"""InLine attention: linear attention that subtracts the mean of a row in place of dividing by its sum, with a local residual.

    s_ij = D^-1/2 phi(q_i).phi(k_j) / N,   w_ij = s_ij - mean_j s_ij + 1 / N,   phi = identity
    o_i = s_i V + (1 - D^-1/2 phi(q_i).mean_j phi(k_j)) mean_j v_j
    kernel = W_2 gelu(W_1 mean_i x_i)   (per head: 9 numbers for every channel),    y = W_o (o + conv_3x3(v; kernel))

Divided rows are the same for a query and its multiple; these are not. Rows sum to 1, weights may be negative.

Source: inline, arXiv 2412.06590.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.bidirectional import bidir_linear
from saccade.parts.linear.grid import Grid, as_map, as_tokens, check_grid, check_kernel, image_grid
from saccade.parts.linear.image import ImageLinear

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": torch.relu, "leaky-relu": F.leaky_relu, "exp": torch.exp,
}  # fmt: skip


@register
@dataclass(frozen=True, kw_only=True)
class InLine(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. feature_map: "identity",
    "relu", "leaky-relu" or "exp". kernel: width of the residual's convolution in tokens, 0 for no residual. cls: the first token is a
    class token outside the image."""

    grid: tuple[int, int] | None = None
    feature_map: Literal["identity", "relu", "leaky-relu", "exp"] = "identity"
    kernel: int = 3
    cls: bool = False

    info = Info(
        slug="inline", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"grid": (0, 8)},
        variants=({"feature_map": "exp", "kernel": 0}, {"feature_map": "leaky-relu", "cls": True, "grid": (0, 5), "kernel": 5}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)
        if self.feature_map not in MAPS:
            raise ValueError(f"feature_map={self.feature_map!r} is not known: use one of {', '.join(MAPS)}")

    def build(self, shape: MixerShape) -> TokenMixer:
        return InLineMixer(shape, self)


class InLineMixer(ImageLinear):
    """The layer. residual: makes a kernel for every channel of every sample."""

    def __init__(self, shape: MixerShape, method: InLine) -> None:
        super().__init__(shape, grid=method.grid)
        self.method, self.kernel = method, method.kernel
        self.residual = nn.Sequential(
            nn.Conv1d(shape.dim, self.width, 1, groups=self._groups(shape)), nn.GELU(),
            nn.Conv1d(self.width, self.kernel**2 * self.width, 1, groups=shape.heads),
        ) if self.kernel else None  # fmt: skip

    @staticmethod
    def _groups(shape: MixerShape) -> int:
        return shape.heads if shape.dim % shape.heads == 0 else 1

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        phi = MAPS[self.method.feature_map]
        return phi(q) * q.shape[-1] ** -0.5, phi(k) / k.shape[2]

    def read(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return bidir_linear(q, k, v, "divisive")

    def weights(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        s = q @ k.mT
        return s - s.mean(-1, keepdim=True) + 1 / k.shape[2]

    def places(self, n: int) -> Grid:
        return image_grid(n - self.method.cls, self.grid) if self.residual is not None else (1, n)

    def around(self, v: Tensor, x: Tensor, grid: Grid) -> Tensor | None:
        first = int(self.method.cls)
        if self.residual is None or v.shape[1] == first:
            return None
        b, n, width = v.shape
        kernels = self.residual(x.mean(1).unsqueeze(-1)).reshape(b * width, 1, self.kernel, self.kernel)
        image = as_map(v[:, first:], grid).flatten(0, 1).unsqueeze(0)
        y = F.conv2d(image, kernels, padding=self.kernel // 2, groups=b * width)
        return F.pad(as_tokens(y.squeeze(0).unflatten(0, (b, width)), n - first), (0, 0, first, 0))
