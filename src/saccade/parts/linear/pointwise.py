"""Attention with any function of the logit in the place of the exponential."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Kernel = Callable[[Tensor, Tensor], Tensor]


def pointwise_read(
    q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, *, own: Tensor | None = None, places: Tensor | None = None,
    scale: float | None = None, block: int = 256,
) -> Tensor:  # fmt: skip
    """`out_i = sum_j kernel(s_ij, m_i) v_j` with `s_ij = scale q_i.k_j` and m_i the largest logit of the row (`(..., 1)`, no gradient).

    q `(B, Hq, N, D)`, k `(B, Hk, M, D)`, v `(B, Hk, M, Dv)`, Hk dividing Hq. own `(B, N)`, places `(B or 1, M)`: a query reads the keys
    whose place is not behind its own; without them it reads all. scale: default `D ** -0.5`. Computed and returned in float32 at least,
    in blocks of `block` queries that are computed again for the gradient, so that no N x M weights are stored.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    groups, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    rows = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)).unflatten(1, (kv_heads, groups))
    k, v = k.to(wide), v.to(wide)

    def one(part: Tensor, k: Tensor, v: Tensor, at: Tensor | None) -> Tensor:
        s = (part.flatten(2, 3) @ k.mT).unflatten(2, (groups, -1))
        if at is None or places is None:
            return (kernel(s, s.amax(-1, keepdim=True).detach()).flatten(2, 3) @ v).unflatten(2, (groups, -1))
        mask = (places[:, None] <= at[:, :, None])[:, None, None]
        top = s.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True).detach()
        top = top.masked_fill(top == float("-inf"), 0.0)
        # unseen logits are set to the largest seen one, so that no kernel overflows on them
        weights = kernel(torch.where(mask, s, top), top).masked_fill(~mask, 0.0)
        return (weights.flatten(2, 3) @ v).unflatten(2, (groups, -1))

    outs = []
    for begin in range(0, q.shape[2], block):
        given = (rows[:, :, :, begin : begin + block], k, v, None if own is None else own[:, begin : begin + block])
        many = q.shape[2] > block and torch.is_grad_enabled()
        outs.append(checkpoint(one, *given, use_reentrant=False) if many else one(*given))
    return torch.cat(outs, dim=3).flatten(1, 2)
