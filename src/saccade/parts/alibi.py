"""How far a head can see where distance is penalised linearly (ALiBi): beyond that, every attention weight is below a bound.

Source: razorattention, arXiv 2407.15891, theorem 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_reach(slope: float, w_q: Tensor, w_k: Tensor, gamma: Tensor, beta: Tensor | None = None, *, eps: float = 1e-3) -> float:
    """Tokens after which a key of an ALiBi head weighs less than `eps`, whatever the input:

        L = (2 ||W_Q W_K^T||_2 (||gamma||^2 + ||beta||^2) - log eps) / slope

    slope: l_h > 0 of the logit `x_i W_Q W_K^T x_j^T - l_h (i - j)`. w_q, w_k `(dim, D)`: projections of the head, x W (torch's Linear
    holds the transpose); a factor on the logits, such as D ** -0.5, goes into one of them. gamma, beta `(dim,)`: scale and shift of the
    LayerNorm before the layer (no beta: an RMSNorm). Inputs x = gamma u + beta are taken to have ||x||^2 <= ||gamma||^2 + ||beta||^2, as in
    the paper: a normalised u has mean square 1, and gamma u and beta are not aligned. Logits then differ by at most twice the norm times
    that, and the rest is the penalty's.

    ValueError for a slope or an eps that is not positive, or an eps of 1 or more.
    """
    if slope <= 0 or not 0 < eps < 1:
        raise ValueError(f"alibi_reach got slope={slope!r} and eps={eps!r}: give a slope above 0 and an eps between 0 and 1")
    exact = torch.float64
    norm = float(torch.linalg.matrix_norm(w_q.to(exact) @ w_k.to(exact).mT, ord=2))
    shift = 0.0 if beta is None else float(beta.to(exact).square().sum())
    return (2 * norm * (float(gamma.to(exact).square().sum()) + shift) - math.log(eps)) / slope


def alibi_keep(reach: float, local: int) -> int:
    """Newest tokens that such a head keeps: its reach, at least `local` (the paper's S0)."""
    return max(math.ceil(reach), local)
