"""Attention of each query to its own key alone, for tokens that later queries do not see."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import LayerContext, Partial


def own_key(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, where: Tensor) -> Partial:
    """A Partial `(B, Hq, m, Dv)` over key i alone for query i of q `(B, Hq, m, D)`, k, v `(B, Hk, m, ...)`.

    Empty where `where (B, m)`, bool, is False. Counted in the context, where it is True.
    """
    exact, heads = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    logits = (q.to(exact).unflatten(1, (heads, -1)) * k.to(exact).unsqueeze(2)).sum(-1) * ctx.scale
    if ctx.softcap is not None:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    lse = logits.masked_fill(~where[:, None, None], -torch.inf).flatten(1, 2)
    ctx.count(float(where.sum(-1).double().mean()))
    out = v.unsqueeze(2).expand(-1, -1, q.shape[1] // heads, -1, -1).flatten(1, 2) * where[:, None, :, None]
    return Partial(out, lse)
