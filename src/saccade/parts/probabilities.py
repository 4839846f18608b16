"""Attention probabilities of a cache's newest queries over all of its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import over_groups


def probabilities(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, valid: Tensor | None = None, behind: int = 0
) -> Tensor:
    """Softmax weights `(B, Hk, group, m, n)`, float32 (float64 for float64 keys), in one piece: callers choose m to fit
    memory.

    q `(B, Hq, m, D)` belongs to the newest m tokens but the last `behind`; k `(B, Hk, n, D)` holds all entries, oldest
    first. A query sees the entries up to its own. valid: `(B, Hk, n)` bool, or None; a head's gaps stand at its end.
    """
    m, n = q.shape[2], k.shape[2]
    exact = torch.promote_types(k.dtype, torch.float32)
    groups = q.to(exact).unflatten(1, (k.shape[1], -1))
    logits = over_groups(groups, k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    slots = torch.arange(n, device=k.device)
    own = torch.arange(m, device=k.device)[:, None] - m - behind
    hidden = slots > n + own
    if valid is not None:
        hidden = (slots > valid.sum(-1)[:, :, None, None, None] + own) | ~valid[:, :, None, None]
    return torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
