"""Softmax over the last few tokens, left open: hybrids complete it with a sum over all that lie further back.

    top_t = max_{t-w < j <= t} l_tj,   total_t = sum_j e^(l_tj - top_t),   value_t = sum_j e^(l_tj - top_t) v_j

Queries are cut into blocks; each block reads its own keys and the w before it, so cost and memory are linear in the length. What is joined
to the result is not divided by e^top, so top is part of the function and its gradient is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.linear.partial import PartialSoftmax

SMALLEST_BLOCK = 32  # queries: a narrow window in blocks of its own width would be many tiny products


def band_partial(
    q: Tensor, k: Tensor, v: Tensor, held_k: Tensor, held_v: Tensor, start: Tensor, *, window: int, scale: float | None = None
) -> PartialSoftmax:
    """Softmax of q `(B, H, N, D)` over the last `window` keys, its own among them, of k `(B, Hk, N, D)` and v `(B, Hk, N, Dv)`.

    held_k, held_v `(B, window, Hk, D)`: the tokens before, the newest last, of which the last `start (B,)` exist. Query heads are equal
    groups over the key heads. scale: default `D ** -0.5`. Computed in float32 at least.
    """
    n, d = q.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    size = min(max(window, SMALLEST_BLOCK), n)
    blocks = -(-n // size)
    spare = blocks * size - n
    rows = torch.nn.functional.pad(q.to(wide) * (d**-0.5 if scale is None else scale), (0, 0, 0, spare))
    rows = rows.unflatten(2, (blocks, size)).unflatten(1, (k.shape[1], -1)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
    keys, values = (_slices(held, x, size, spare).to(wide) for held, x in ((held_k, k), (held_v, v)))
    logits = (rows @ keys.mT).unflatten(3, (-1, size))  # (B, blocks, Hk, G, size, window + size)
    i, c = torch.arange(size, device=q.device)[:, None], torch.arange(window + size, device=q.device)
    exists = torch.arange(blocks, device=q.device)[:, None] * size + c >= (window - start)[:, None, None]
    mask = ((c > i) & (c <= i + window)) & exists[:, :, None]
    logits = logits.masked_fill(~mask[:, :, None, None], float("-inf"))
    # a query sees itself at least, so no row is empty
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp()
    value = (weights.flatten(3, 4) @ values).unflatten(3, (-1, size))
    top, total, value = (
        x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)[:, :, :n] for x in (top, weights.sum(-1, keepdim=True), value)
    )
    return PartialSoftmax(top, total, value)


def _slices(held: Tensor, new: Tensor, size: int, spare: int) -> Tensor:
    """`(B, blocks, Hk, window + size, D)`: for each block its tokens and those before it."""
    joined = torch.cat([held.to(new.dtype).transpose(1, 2), torch.nn.functional.pad(new, (0, 0, 0, spare))], dim=2)
    return joined.unfold(2, held.shape[1] + size, size).permute(0, 2, 1, 4, 3)
