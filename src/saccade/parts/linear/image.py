"""Linear attention over the tokens of an image: feature maps, one product of keys and values, and a convolution that stays local.

    phi_q, phi_k = maps(W_q x, W_k x)
    o_i = sum_j w_ij v_j,    w_ij = rope(phi_q_i).rope(phi_k_j) / (sum_j phi_q_i.phi_k_j + N eps)
    y = W_o gate(x) * norm(o + conv(v))

The rotary embedding turns by row and column and acts on the products alone, not on the sum that normalises them, so rows sum to 1
without it. A paper overrides `maps`, and `read` with `weights` where it normalises otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from saccade.core import Call, MixerShape
from saccade.parts.linear.bidirectional import bidir_linear
from saccade.parts.linear.grid import AxialRotary, Grid, GridConv, image_grid
from saccade.parts.linear.output import OutputGate
from saccade.parts.linear.two_way import TwoWay


class ImageLinear(TwoWay):
    """grid: as in `image_grid`. kernel: width of the depthwise convolution on the values, 0 for none; per_head: heads share its weights.
    rotary: turn by row and column. gate: activation of the output gate ("none" for a linear one), None for no gate. norm: layer norm
    before the gate."""

    eps = 1e-6

    def __init__(
        self, shape: MixerShape, *, grid: Sequence[int] | None, kernel: int = 0, per_head: bool = False, rotary: bool = False,
        gate: str | None = None, norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(shape)
        self.grid = grid
        self.local: nn.Module | None = GridConv(shape.head_dim if per_head else self.width, kernel) if kernel else None
        self.rotary = AxialRotary(shape.head_dim) if rotary else None
        self.norm = nn.LayerNorm(self.width) if norm else None
        self.out_gate = None if gate is None else OutputGate(shape.dim, self.width, gate)

    @abstractmethod
    def maps(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """phi_q and phi_k `(B, H, N, F)` of q, k `(B, H, N, D)`."""

    def turned(self, x: Tensor, grid: Grid) -> Tensor:
        """Features `(B, H, N, F)`, each group of head_dim channels of them, turned to their places."""
        if self.rotary is None:
            return x
        return self.rotary(x.unflatten(-1, (-1, self.shape.head_dim)).movedim(3, 2).flatten(1, 2), grid).unflatten(
            1, (self.heads, -1)
        ).movedim(2, 3).flatten(3)  # fmt: skip

    def read(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """`(B, H, N, D)` of features q, k and values v, in time linear in N."""
        total = q @ k.sum(2, keepdim=True).mT + k.shape[2] * self.eps
        return bidir_linear(self.turned(q, grid) / total, self.turned(k, grid), v, "none")

    def weights(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        """All weights `(B, H, N, N)` by which `read` adds values."""
        total = (q @ k.mT).sum(-1, keepdim=True) + k.shape[2] * self.eps
        return self.turned(q, grid) @ self.turned(k, grid).mT / total

    def project(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `(B, N, H * D)`."""
        assert self.k_proj is not None
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def around(self, v: Tensor, x: Tensor, grid: Grid) -> Tensor | None:
        """The local branch `(B, N, H * D)` of values v `(B, N, H * D)`, or None."""
        return None if self.local is None else self.local(v, grid)

    def places(self, n: int) -> Grid:
        """The map of n tokens, where something needs it."""
        return (1, n) if self.local is None and self.rotary is None else image_grid(n, self.grid)

    def finish(self, out: Tensor, v: Tensor, x: Tensor, grid: Grid) -> Tensor:
        y, local = self.joined(out, x), self.around(v, x, grid)
        y = y if local is None else y + local
        y = y if self.norm is None else self.norm(y)
        return self.o_proj(y if self.out_gate is None else self.out_gate(y, x))

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        grid = self.places(x.shape[1])
        q, k, v = self.project(x, grid)
        phi = self.maps(self.split(q), self.split(k))
        return self.finish(self.read(*phi, self.split(v), grid), v, x, grid), {}

    def naive(self, x: Tensor) -> Tensor:
        grid = self.places(x.shape[1])
        q, k, v = self.project(x, grid)
        phi = self.maps(self.split(q), self.split(k))
        return self.finish(self.weights(*phi, grid) @ self.split(v), v, x, grid)
