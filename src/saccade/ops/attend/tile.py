"""Attention of small tiles of queries over gathered keys: the inner step of the gathering implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial, over_groups


def attend_tile(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None, bias: Tensor | None,
    return_lse: bool,
) -> Partial:  # fmt: skip
    """q `(P, H, m, D)` over k `(P, H, n, D)`, v `(P, H, n, Dv)`; mask (0 or -inf) and bias broadcast to `(P, H, m, n)`. Or q `(B, Hk,
    group, m, D)` over k and v with 1 in the place of the group.

    Without softcap, bias and log-sum-exp it is torch's fused kernel, which leaves rows with nothing visible undefined. Else such rows
    give 0 and lse -inf: in the kernel that also gives the log-sum-exp where it runs (CPU, no gradients, no half precision), or in plain
    torch in float32 (float64 for float64).
    """
    if softcap is None and bias is None and not return_lse:
        return Partial(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None)
    if softcap is None and _fuses(q, k, v, bias):
        return _fused(q, k, v, mask, bias, scale)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = _for_groups(q.to(exact), k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(exact)
    if mask is not None:
        # filled, not added: the gradient of a row that sees nothing is then 0 and not nan
        logits = logits.masked_fill(mask == -torch.inf, -torch.inf)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return Partial(_for_groups(weights, v.to(exact)).to(q.dtype), lse)


def _for_groups(x: Tensor, y: Tensor) -> Tensor:
    return over_groups(x, y.squeeze(2)) if x.ndim == 5 and y.shape[2] == 1 else x @ y


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool = False, added: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """torch's fused CPU attention and its log-sum-exp `(B, H, m)`; `added` is an additive mask in the dtype of q."""
    # the kernel takes the channels of a row to lie side by side, and does not look
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=added, scale=scale)
    # the kernel lays the log-sum-exp out as (B, m, H) in memory and returns a transposed view
    return out, lse if lse.shape == q.shape[:3] else lse.transpose(1, 2)


def _fuses(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    given = (q, k, v) if bias is None else (q, k, v, bias)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    # in half precision the kernel rounds its weights and its output, which is to be merged: plain torch rounds once
    exact = q.dtype in (torch.float32, torch.float64)
    return exact and q.device.type == "cpu" and q.ndim == 4 and k.shape[2] > 0 and q.shape[-1] == v.shape[-1] and not needs_grad


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Partial:
    added = mask if bias is None else bias.to(q.dtype) if mask is None else mask + bias.to(q.dtype)
    if added is None:
        return Partial(*cpu_flash(q, k, v, scale))
    blind = (added == -torch.inf).all(-1)
    added = added.to(q.dtype).expand(added.shape[0], 1 if added.shape[1] == 1 else q.shape[1], q.shape[2], k.shape[2])
    out, lse = cpu_flash(q, k, v, scale, added=added)
    if bool(blind.any()):
        out, lse = out.masked_fill(blind.unsqueeze(-1), 0.0), lse.masked_fill(blind, -torch.inf)
    return Partial(out, lse)
