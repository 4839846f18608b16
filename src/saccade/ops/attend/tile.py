"""Attention of small tiles of queries over gathered keys: the inner step of the gathering implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, bias: Tensor | None,
    return_lse: bool,
) -> Partial:  # fmt: skip
    """q `(P, H, m, D)` over k `(P, H, n, D)`, v `(P, H, n, Dv)`; mask (0 or -inf) and bias broadcast to `(P, H, m, n)`.

    Without softcap, bias and log-sum-exp it is torch's fused kernel, which leaves rows with nothing visible undefined; else plain
    torch in float32 (float64 for float64), where such rows give 0 and lse -inf.
    """
    if softcap is None and bias is None and not return_lse:
        return Partial(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q.to(exact) @ k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(exact)
    if mask is not None:
        # filled, not added: the gradient of a row that sees nothing is then 0 and not nan
        logits = logits.masked_fill(mask == -torch.inf, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return Partial((weights @ v.to(exact)).to(q.dtype), lse)
