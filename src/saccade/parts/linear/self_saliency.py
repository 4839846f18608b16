"""How much a token's own key changes what the token attends to, and the tokens of a chunk for which that is most."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def self_saliency(logits: Tensor, own: Tensor, size: int, eps: float = 1e-8) -> Tensor:
    """`KL(P || P')` of logits `(..., M)` over keys, -inf where a key is not among the `size` last ones: `(...)`.

    P is their softmax, P' that without the token's own key, which own `(..., M)` bool marks; the own entry of P' is 1 / size, and eps is
    added to both. Alone, a token has P' = 0 elsewhere, so that the first of a sequence scores log(size), as much as any can.
    Source: still.
    """
    p = logits.softmax(-1)
    others = logits.masked_fill(own, float("-inf"))
    alone = others.amax(-1, keepdim=True) == float("-inf")
    q = others.masked_fill(alone, 0.0).softmax(-1).masked_fill(alone, 0.0).masked_fill(own, 1 / size)
    return ((p + eps) * ((p + eps) / (q + eps)).log()).sum(-1)


def most_salient(scores: Tensor, count: int) -> Tensor:
    """`(..., count)` int64, ascending: where the largest of scores `(..., size)` stand; among equals the earlier one."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
