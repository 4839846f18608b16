"""Parallax: softmax attention minus a learned probe of how the values move with the keys.

    q, k, v, r = W x,  q, k and r turned by the same rotary angles,   p_ij = softmax_j(scale q_i.k_j),   t_ij = r_i.k_j  (not scaled)
    o_i = sum_j p_ij (1 + tbar_i - t_ij) v_j = E_p[v] - Cov_p(v, k) r_i,      tbar_i = sum_j p_ij t_ij

Local linear attention solves for r_i in every row; here one projection of the query's token gives it, with as many heads as q. The weights
of a row sum to 1 and may be negative; r = 0 is softmax attention. The state is that of softmax attention.

Source: parallax, arXiv 2605.29157.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.cached import CachedMixer
from saccade.methods.linear.softmax import Softmax
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.moments import covariance


@register
@dataclass(frozen=True, kw_only=True)
class Parallax(Mixer):
    """scale: bandwidth of the softmax, on q.k (default head_dim^-1/2). qk_norm: RMS norm of q, k and r per head. zero: start with r = 0,
    which is softmax attention. window: tokens a query sees, its own among them; None: all. rotary, theta: as in softmax."""

    scale: float | None = None
    qk_norm: bool = False
    zero: bool = True
    window: int | None = None
    rotary: bool = True
    theta: float = 10000.0

    info = Info(
        slug="parallax", phase="mixer", needs=frozenset({"training"}),
        variants=({"zero": False, "qk_norm": True, "window": 16}, {"zero": False, "rotary": False, "scale": 0.5}),
        opts_out={"constant": "without a window the keys and values of all tokens are kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale < 0:
            raise ValueError(f"scale={self.scale}: give at least 0, or None for head_dim^-1/2")
        self._softmax()

    def _softmax(self) -> Softmax:
        return Softmax(window=self.window, rotary=self.rotary, theta=self.theta, qk_norm=self.qk_norm)

    def build(self, shape: MixerShape) -> TokenMixer:
        return ParallaxMixer(shape, self, self._softmax())


class ParallaxMixer(CachedMixer):
    """The layer: softmax attention's, with one more projection."""

    def __init__(self, shape: MixerShape, rule: Parallax, softmax: Softmax) -> None:
        super().__init__(shape, softmax)
        self.rule = rule
        self.r_proj = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False)
        if rule.zero:
            nn.init.zeros_(self.r_proj.weight)
        self.r_norm = nn.RMSNorm(shape.head_dim, eps=1e-6) if rule.qk_norm else nn.Identity()

    def probe(self, x: Tensor, call: Call) -> Tensor:
        """r `(B, Hq, N, D)`, turned to its positions."""
        r = self.r_norm(heads_first(self.r_proj(x), self.heads))
        return r if self.rotary is None else self.rotary(r, call.positions)

    def read(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, call: Call, own: Tensor, places: Tensor) -> Tensor:
        mean, moved = covariance(q, k, v, self.probe(x, call), own, places, scale=self.rule.scale, window=self.rule.window)
        return mean - moved

    def define(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor, call: Call) -> Tensor:
        return self.weights(q, k, self.probe(x, call).to(q.dtype), mask) @ v

    def weights(self, q: Tensor, k: Tensor, r: Tensor, mask: Tensor) -> Tensor:
        """All weights `(B, H, N, N)`."""
        scale = q.shape[-1] ** -0.5 if self.rule.scale is None else self.rule.scale
        p = (scale * q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1)
        t = r @ k.mT
        return p * (1 + (p * t).sum(-1, keepdim=True) - t)
