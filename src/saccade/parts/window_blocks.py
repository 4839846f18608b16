"""Blocks of keys for every query, found through the means of overlapping windows of keys.

    p_w = sum over the query heads of a group of softmax_w(q . mean_w D^-1/2)       windows that end at or before the query
    score(block) = max of p_w over the windows that overlap the block

The first blocks and those that hold the last `local` tokens are always among the chosen. No parameters. Source: minicpm-sala.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

AT_ONCE = 1 << 24  # scores held at a time


@torch.no_grad()
def choose_blocks(
    q: Tensor, means: Tensor, first: int, *, window: int, stride: int, block: int, top: int, init: int, local: int
) -> tuple[Tensor, Tensor]:
    """(blocks `(B, Hk, n, M)` int64 ascending, absent ones past the end; how many `(B, Hk, n)`) of q `(B, H, n, D)` at places
    `first ... first + n - 1`, with means `(B, Hk, W, D)` of windows `stride w ... stride w + window - 1`; stride divides block.

    top: blocks a query reads at most, the first `init` and those of its last `local` tokens among them; between equal scores the earlier
    block.
    """
    n, width = q.shape[2], max(1, means.shape[2])
    size = max(1, AT_ONCE // (q.shape[0] * q.shape[1] * width))
    blocks = (first + n - 1) // block + 1
    parts = [
        _choose(q[:, :, at : at + size], means, first + at, blocks, window, stride, block, top, init, local) for at in range(0, n, size)
    ]
    return torch.cat([part[0] for part in parts], dim=2), torch.cat([part[1] for part in parts], dim=2)


def _choose(
    q: Tensor, means: Tensor, first: int, blocks: int, window: int, stride: int, block: int, top: int, init: int, local: int
) -> tuple[Tensor, Tensor]:
    places = torch.arange(first, first + q.shape[2], device=q.device)[:, None]
    kv_heads, n = means.shape[1], q.shape[2]
    rows = (q.to(means.dtype) * q.shape[-1] ** -0.5).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = (rows @ means.mT).unflatten(2, (-1, n))  # (B, Hk, G, n, W)
    ends = torch.arange(means.shape[2], device=q.device) * stride + window
    hidden = ends > places + 1
    # a query before the end of the first window sees none
    p = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0.0).sum(2)
    step, before = block // stride, -(-window // stride) - 1
    p = pad(p, (before, max(0, blocks * step - p.shape[-1])))
    score = p.unfold(-1, step + before, step)[..., :blocks, :].amax(-1)
    ids = torch.arange(blocks, device=q.device)
    forced = (ids < init) | (ids >= (places - local + 1).clamp(min=0) // block)
    score = score.masked_fill(forced, float("inf")).masked_fill(ids > places // block, -1.0)
    order = score.sort(dim=-1, descending=True, stable=True)
    chosen = order.indices[..., :top].masked_fill(order.values[..., :top] < 0, blocks).sort(dim=-1).values
    return chosen, (chosen < blocks).sum(-1)
