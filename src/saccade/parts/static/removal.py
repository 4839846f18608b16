"""What a loss would become without single keys: moa's first-order estimate from attention weights and their gradients.

With A the softmax row of a query and G = dLoss/dA, removing key j and normalising the row again changes the loss, to first order, by

    E_ij = A_ij / (1 - A_ij) * (sum_n G_in A_in - G_ij)

which is exactly G . (A' - A) for the row A' without j. Source: moa, arXiv 2406.14909, equation 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-6  # a row that attends to one key alone has no other to fall back on


def removal_effect(weights: Tensor, gradient: Tensor) -> Tensor:
    """E of rows of attention weights and dLoss/dweights, `(..., n)` each. Where a key holds all of a row: minus what it brings."""
    total = (weights * gradient).sum(-1, keepdim=True)
    effect = weights / (1 - weights + EPSILON) * (total - gradient)
    return torch.where(weights >= 1 - EPSILON, -gradient * weights, effect)


def removal_by_tile(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, *, scale: float, softcap: float | None, block: int) -> Tensor:
    """Sums of E over tiles of `block` x `block` and over the batch, float32 `(Hk, group, T, T)`; 0 above the diagonal.

    q, d_out `(B, Hq, N, ...)` with the gradient of the loss to the attention output; k, v `(B, Hk, N, ...)`; causal. One row of tiles
    of the N x N map is held at a time.
    """
    n, kv_heads = k.shape[2], k.shape[1]
    tiles = math.ceil(n / block)
    q, d_out = (x.float().unflatten(1, (kv_heads, -1)) for x in (q, d_out))
    k, v = k.float().unsqueeze(2), v.float().unsqueeze(2)
    sums = torch.zeros(kv_heads, q.shape[2], tiles, tiles, device=q.device)
    for row in range(tiles):
        begin, end = row * block, min((row + 1) * block, n)
        logits = q[..., begin:end, :] @ k[..., :end, :].mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        future = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device).unsqueeze(1)
        weights = logits.masked_fill(future, -torch.inf).softmax(-1)
        effect = removal_effect(weights, d_out[..., begin:end, :] @ v[..., :end, :].mT).masked_fill(future, 0.0)
        effect = torch.nn.functional.pad(effect, (0, (row + 1) * block - end))
        sums[..., row, : row + 1] = effect.unflatten(-1, (row + 1, block)).sum((0, -3, -1))
    return sums
