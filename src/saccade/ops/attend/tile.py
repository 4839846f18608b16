"""Attention of one small tile of queries over gathered keys: the inner step of the gathering implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, *, scale: float, softcap: float | None, bias: Tensor | None,
    return_lse: bool,
) -> Partial:  # fmt: skip
    """q `(B, H, m, D)` over k `(B, H, n, D)`, v `(B, H, n, Dv)`; visible and bias broadcast to `(B, H, m, n)`.

    Without softcap, bias and log-sum-exp it is torch's fused kernel; else float32 arithmetic in plain torch.
    A row with nothing visible gives 0 and lse -inf.
    """
    if softcap is None and bias is None and not return_lse:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        if visible is not None:
            empty = ~visible.any(-1)
            # fused kernels leave rows without a key undefined
            if bool(empty.any()):
                out = out.masked_fill(empty.unsqueeze(-1), 0.0)
        return Partial(out, None)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q.to(exact) @ k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(exact)
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return Partial((weights @ v.to(exact)).to(q.dtype), lse)
