"""MALA, magnitude-aware linear attention: rows are brought to a sum of 1 by an affine map whose spread grows with the query's length.

    phi = elu + 1,   s_ij = D^-1/2 phi(q_i).phi(k_j) / N,   S_i = sum_j s_ij
    w_ij = (1 + 1 / S_i) s_ij - S_i / N,    o_i = (1 + 1 / S_i) D^-1/2 / N phi(q_i) (phi(K)^T V) - S_i mean_j v_j
    y = W_o (W_g x * (o + conv_5x5(v)))

Dividing by S_i alone would cancel the length of phi(q_i). Weights may be negative. S_i is taken of the features before the rotary
embedding (by row and column), the products after it, so rows sum to 1 exactly without it.

Source: mala, arXiv 2507.00698.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.bidirectional import bidir_linear
from saccade.parts.linear.features import squashed_exp
from saccade.parts.linear.grid import Grid, check_grid, check_kernel
from saccade.parts.linear.image import ImageLinear


@register
@dataclass(frozen=True, kw_only=True)
class Mala(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. rotary: turn by row and
    column. kernel: width of the convolution on the values in tokens, 0 for none. gate: multiply by a linear map of x."""

    grid: tuple[int, int] | None = None
    rotary: bool = True
    kernel: int = 5
    gate: bool = True

    info = Info(
        slug="mala", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"grid": (0, 8)},
        variants=({"rotary": False, "kernel": 0, "gate": False},),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)

    def build(self, shape: MixerShape) -> TokenMixer:
        return MalaMixer(shape, grid=self.grid, kernel=self.kernel, rotary=self.rotary, gate="none" if self.gate else None)


class MalaMixer(ImageLinear):
    """The layer."""

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return squashed_exp(q) * q.shape[-1] ** -0.5, squashed_exp(k) / k.shape[2]

    def read(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        total = q @ k.sum(2, keepdim=True).mT
        beta = 1 + 1 / (total + self.eps)
        return bidir_linear(beta * self.turned(q, grid), self.turned(k, grid), v, "none") - total * v.mean(2, keepdim=True)

    def weights(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        total = (q @ k.mT).sum(-1, keepdim=True)
        return (1 + 1 / (total + self.eps)) * (self.turned(q, grid) @ self.turned(k, grid).mT) - total / k.shape[2]
