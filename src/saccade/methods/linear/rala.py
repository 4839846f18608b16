"""RALA, rank-augmented linear attention: tokens enter the buffer of keys and values weighted by a global query, and the output is
multiplied by a linear map of the input, which raises its rank beyond that of the heads.

    phi = elu + 1,   g = mean_i phi(q_i),   a_j = softmax_j(D^-1/2 g.phi(k_j)),   k'_j = N a_j phi(k_j)
    o_i = rope(phi(q_i)) (mean_j rope(k'_j) v_j^T) / (phi(q_i).mean_j k'_j + 1e-6)
    y = W_o (W_g x * (o + conv_5x5(v)))

The rotary embedding (by row and column) acts in the numerator alone. The global query reads all tokens: there is no causal form.

Source: rala, arXiv 2411.07635.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from saccade.core import Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.features import squashed_exp
from saccade.parts.linear.grid import check_grid, check_kernel
from saccade.parts.linear.image import ImageLinear


@register
@dataclass(frozen=True, kw_only=True)
class Rala(Mixer):
    """grid: (height, width) of the image in tokens, (0, width) for as many rows as there are, None for a square. rotary: turn by row and
    column. kernel: width of the convolution on the values in tokens, 0 for none. gate: multiply by a linear map of x. weighted: by the
    global query; False weights all tokens alike."""

    grid: tuple[int, int] | None = None
    rotary: bool = True
    kernel: int = 5
    gate: bool = True
    weighted: bool = True

    info = Info(
        slug="rala", phase="mixer", needs=frozenset({"training"}), causality="bidirectional", tiny={"grid": (0, 8)},
        variants=({"rotary": False, "kernel": 0, "gate": False}, {"weighted": False, "grid": (0, 5)}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_grid(self.grid)
        check_kernel(self.kernel)

    def build(self, shape: MixerShape) -> TokenMixer:
        made = RalaMixer(shape, grid=self.grid, kernel=self.kernel, rotary=self.rotary, gate="none" if self.gate else None)
        made.weighted = self.weighted
        return made


class RalaMixer(ImageLinear):
    """The layer."""

    weighted: bool = True

    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = squashed_exp(q), squashed_exp(k)
        return q, k * self.importance(q, k) if self.weighted else k

    def importance(self, q: Tensor, k: Tensor) -> Tensor:
        """Weights of the tokens `(B, H, N, 1)`, which sum to N, of features q, k `(B, H, N, D)`."""
        return k.shape[2] * (k @ q.mean(2, keepdim=True).mT * k.shape[-1] ** -0.5).softmax(2)
