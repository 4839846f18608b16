"""Local linear attention: around every query a linear model of the values is fitted, with softmax weights, and read at the query.

    w_ij = exp(scale q_i.k_j),   om_i = sum_j w_ij,   z_ij = k_j - q_i,   mu_i = sum_j w_ij z_ij
    Sig_i = sum_j w_ij z_ij z_ij^T + ridge om_i I,    rho_i = Sig_i^-1 mu_i
    o_i = sum_j w_ij (1 - z_ij.rho_i) v_j / (om_i - mu_i.rho_i)

Softmax attention is the fit by a constant. Divided by om_i and with the denominator taken into the slope (Sherman and Morrison), this is

    o_i = E_p[v] - Cov_p(v, k) s_i,    (Cov_p(k, k) + ridge I) s_i = E_p[k] - q_i,    rho_i = s_i / (1 + s_i.(E_p[k] - q_i))

which is what runs: it has no denominator, and its systems are solved by conjugate gradients whose products are streamed passes over the
keys. ridge to infinity is softmax attention, scale 0 is ridge regression on all tokens so far. Queries and keys live in one space.

Source: local-linear-attention, arXiv 2510.01450; affine=False: parallax, arXiv 2605.29157.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.cached import CachedMixer
from saccade.methods.linear.softmax import Softmax
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.moments import covariance
from saccade.parts.linear.solve import solve


@register
@dataclass(frozen=True, kw_only=True)
class LocalLinearAttention(Mixer):
    """scale: bandwidth, on q.k (default head_dim^-1/2). ridge: on the covariance of the keys, in their units squared; more than 0, as
    early rows have fewer keys than channels. learned: ridge per token and head, softplus of a projection, `ridge` at first.
    affine: False leaves out the denominator, which may amplify. solver: "cg" (memory grows with N) or "direct" (all D x D covariances).
    jacobi: precondition conjugate gradients by the diagonal. steps: at most so many (default 2 head_dim + 8). window, rotary, theta,
    qk_norm: as in softmax.
    """

    scale: float | None = None
    ridge: float = 0.05
    learned: bool = False
    affine: bool = True
    solver: Literal["cg", "direct"] = "cg"
    jacobi: bool = False
    steps: int | None = None
    window: int | None = None
    rotary: bool = True
    theta: float = 10000.0
    qk_norm: bool = True

    info = Info(
        slug="local-linear-attention", phase="mixer", needs=frozenset({"training"}),
        variants=(
            {"learned": True, "jacobi": True, "window": 20}, {"affine": False, "solver": "direct", "qk_norm": False, "ridge": 0.5},
        ),
        opts_out={"constant": "without a window the keys and values of all tokens are kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale < 0:
            raise ValueError(f"scale={self.scale}: give at least 0, or None for head_dim^-1/2")
        if not self.ridge > 0:
            raise ValueError(f"ridge={self.ridge}: give more than 0, as the first tokens leave most directions of the keys empty")
        if self.solver not in ("cg", "direct"):
            raise ValueError(f"solver={self.solver!r} is not 'cg' or 'direct'")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: give at least 1, or None")
        self._softmax()

    def _softmax(self) -> Softmax:
        return Softmax(window=self.window, rotary=self.rotary, theta=self.theta, qk_norm=self.qk_norm)

    def build(self, shape: MixerShape) -> TokenMixer:
        return LocalLinearMixer(shape, self, self._softmax())


class LocalLinearMixer(CachedMixer):
    """The layer: softmax attention's, and the projection of the ridge where it is learned."""

    def __init__(self, shape: MixerShape, rule: LocalLinearAttention, softmax: Softmax) -> None:
        super().__init__(shape, softmax)
        self.rule = rule
        self.ridge_proj = nn.Linear(shape.dim, shape.heads) if rule.learned else None
        if self.ridge_proj is not None:
            nn.init.zeros_(self.ridge_proj.weight)
            nn.init.constant_(self.ridge_proj.bias, rule.ridge + math.log(-math.expm1(-rule.ridge)))

    def ridge(self, x: Tensor) -> Tensor | float:
        """A number, or `(B, H, N, 1)` in float32 at least."""
        if self.ridge_proj is None:
            return self.rule.ridge
        return F.softplus(heads_first(self.ridge_proj(x), self.heads).to(torch.promote_types(x.dtype, torch.float32)))

    def read(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call, own: Tensor, places: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = q.to(wide), k.to(wide)
        fit = partial(covariance, q, k, own=own, places=places, scale=self.rule.scale, window=self.rule.window)
        ridge, none = self.ridge(x), torch.zeros_like(q)
        if self.rule.solver == "direct":
            squares = (k.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
            centre, square = fit(torch.cat([k, squares], -1), none)[0].split([k.shape[-1], squares.shape[-1]], dim=-1)
            spread = square.unflatten(-1, (k.shape[-1], -1)) - centre.unsqueeze(-1) * centre.unsqueeze(-2)
            eye = torch.eye(k.shape[-1], dtype=wide, device=k.device)
            system = spread + eye * (ridge.unsqueeze(-1) if isinstance(ridge, Tensor) else ridge)
            mu = centre - q
            slope = torch.linalg.solve(system, mu.unsqueeze(-1)).squeeze(-1)
        else:
            diagonal = None
            if self.rule.jacobi:
                centre, square = fit(torch.cat([k, k.square()], -1), none)[0].chunk(2, -1)
                diagonal = (square - centre.square() + ridge).detach()
            else:
                centre, _ = fit(k, none)
            mu = centre - q
            slope = solve(lambda p: fit(k, p)[1] + ridge * p, mu, diagonal=diagonal, steps=self.rule.steps)
        if not self.rule.affine:
            slope = slope / (1 + (mu * slope).sum(-1, keepdim=True))
        mean, moved = fit(v, slope)
        return mean - moved

    def define(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor, call: Call) -> Tensor:
        return self.weights(q, k, mask, self.ridge(x)) @ v

    def weights(self, q: Tensor, k: Tensor, mask: Tensor, ridge: Tensor | float) -> Tensor:
        """All weights `(B, H, N, N)` by the first three lines above, in units of `om_i = 1`."""
        scale = q.shape[-1] ** -0.5 if self.rule.scale is None else self.rule.scale
        w = (scale * q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        z = k.unsqueeze(2) - q.unsqueeze(3)
        mu = (w.unsqueeze(-2) @ z).squeeze(-2)
        sigma = z.mT @ (w.unsqueeze(-1) * z)
        sigma = sigma + torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) * (
            ridge.unsqueeze(-1) if isinstance(ridge, Tensor) else ridge
        )
        rho = torch.linalg.solve(sigma, mu.unsqueeze(-1))
        if self.rule.affine:
            return w * (1 - (z @ rho).squeeze(-1)) / (1 - (mu.unsqueeze(-2) @ rho).squeeze(-1))
        centred = z - mu.unsqueeze(3)
        return w * (1 - (centred @ rho).squeeze(-1))
