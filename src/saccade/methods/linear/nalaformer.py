"""NaLaFormer, norm-aware linear attention: the length of a query sets how sharp its row is, and signs are kept apart.

    q+ = relu(q) / |q|,  q- = relu(-q) / |q|,   r = power (1/2 + tanh |q|),   phi(q) = [q+^r ; q-^r]        (2 D features)
    phi(k) = [relu(k^3) ; relu(-k^3)]
    o_i = rope(phi(q_i)) (mean_j rope(phi(k_j)) v_j^T) / (phi(q_i).mean_j phi(k_j) + 1e-6)
    y = W_o (silu(W_g x) * layer_norm(o + conv_5x5(v)))

Only channels of the same sign meet, so weights are not negative, and sum to 1 without the rotary embedding (by row and column, each half
of the features for itself). This is the released form of the method, a revision of its first preprint.

Source: nalaformer, arXiv 2506.21137.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.features import unit
from saccade.parts.linear.grid import check_grid, check_kernel
from saccade.parts.linear.image import ImageLinear


@register
@dataclass(frozen=True, kw_only=True)
class NaLaFormer(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. power: exponents of
    queries run from half of it to one and a half times it. key_power: exponent of the keys, odd. rotary: turn by row and column.
    kernel: width of the convolution on the values in tokens, 0 for none. gate: multiply by silu of a linear map of x."""

    grid: tuple[int, int] | None = None
    power: float = 3.0
    key_power: int = 3
    rotary: bool = True
    kernel: int = 5
    gate: bool = True

    info = Info(
        slug="nalaformer", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"grid": (0, 8)},
        variants=({"rotary": False, "kernel": 0, "gate": False},),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)
        if self.power < 2:
            raise ValueError(f"power={self.power}: give at least 2, so that no exponent is below 1")
        if self.key_power < 1 or self.key_power % 2 == 0:
            raise ValueError(f"key_power={self.key_power}: give an odd number, which keeps the sign")

    def build(self, shape: MixerShape) -> TokenMixer:
        made = NaLaFormerMixer(
            shape, grid=self.grid, kernel=self.kernel, rotary=self.rotary, gate="silu" if self.gate else None, norm=True
        )
        made.powers = self.power, self.key_power
        return made


class NaLaFormerMixer(ImageLinear):
    """The layer."""

    powers: tuple[float, int] = (3.0, 3)

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        sharpness = self.powers[0] * (0.5 + q.norm(dim=-1, keepdim=True).tanh())
        return signed(unit(q)) ** sharpness, signed(k ** self.powers[1])


def signed(x: Tensor) -> Tensor:
    """`[relu(x) ; relu(-x)]` along the last axis."""
    return torch.cat([x.relu(), (-x).relu()], dim=-1)
