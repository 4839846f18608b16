"""Attention inside blocks of tokens that don't overlap: the local half of linear attentions (transnormer, linear-log-normal)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.core import Call
from saccade.parts.linear.both_ways import fold, unfold
from saccade.parts.linear.partial import partial_softmax

Weights = Literal["softmax", "relu"]


def block_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, weights: Weights) -> Tensor:
    """`softmax(q k^T D^-1/2) v` or `relu(q k^T D^-1/2) v` where mask (bool, broadcastable to `(B, H, N, M)`) is True; 0 in empty rows."""
    if weights == "softmax":
        return partial_softmax(q, k, v, mask).out
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = unfold(fold(q.to(wide), k.shape[1]) @ k.to(wide).mT * q.shape[-1] ** -0.5, q.shape[2]).relu().masked_fill(~mask, 0.0)
    return unfold(fold(scores, k.shape[1]) @ v.to(wide), q.shape[2])


def attend_blocks(
    q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call, *, block: int, weights: Weights = "softmax",
    bidirectional: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """(out `(B, H, N, Dv)`, what to keep) of q `(B, H, N, D)` and k, v `(B, Hk, N, D)`: token i reads those of its block `i // block`,
    up to itself unless bidirectional. Blocks are counted from the sequence's start.

    Kept: "k" and "v" `(B, block, Hk, D)` of the block that is not full yet, as many bytes at every length.
    """
    b, n = q.shape[0], q.shape[2]
    offset = call.start % block
    count = -(-(n + (block - 1 if past else 0)) // block) + 1
    place = offset[:, None] + torch.arange(n, device=q.device)
    keys, values = (_laid(x.transpose(1, 2), past.get(name), place, count * block) for x, name in ((k, "k"), (v, "v")))
    kept: dict[str, Tensor] = {}
    if call.keep and not bidirectional:
        ends = offset + (n if call.lengths is None else call.lengths)
        rest = ((ends // block * block)[:, None] + torch.arange(block, device=q.device))[..., None, None]
        kept = {name: x.gather(1, rest.expand(-1, -1, *x.shape[2:])) for name, x in (("k", keys), ("v", values))}
    if n == 1:
        own = place[:, :, None] // block * block + torch.arange(block, device=q.device)
        near = own[:, 0, :, None, None]
        own_k, own_v = (x.gather(1, near.expand(-1, -1, *x.shape[2:])).transpose(1, 2) for x in (keys, values))
        # later slots are empty: nothing comes after a single token, both ways
        return block_weights(q, own_k, own_v, (own <= place[:, :, None]).unsqueeze(1), weights).to(q.dtype), kept
    queries = _laid(q.transpose(1, 2), None, place, count * block)
    slots = torch.arange(block, device=q.device)
    if bidirectional:
        real = torch.ones(b, n, dtype=torch.bool, device=q.device) if call.real is None else call.real
        mask = _laid(real[..., None, None], None, place, count * block).reshape(b * count, 1, 1, block)
    else:
        mask = slots[:, None] >= slots
    rows, cols, content = (x.unflatten(1, (count, block)).flatten(0, 1).transpose(1, 2) for x in (queries, keys, values))
    out = block_weights(rows, cols, content, mask, weights).transpose(1, 2).unflatten(0, (b, count)).flatten(1, 2)
    out = out.gather(1, place[..., None, None].expand(-1, -1, *out.shape[2:]))
    return out.transpose(1, 2).to(q.dtype), kept


def _laid(x: Tensor, held: Tensor | None, place: Tensor, size: int) -> Tensor:
    """x `(B, N, H, D)` at its places `(B, N)` among `size` slots, those held `(B, block, H, D)` before them, zeros elsewhere."""
    slots = x.new_zeros(x.shape[0], size, *x.shape[2:])
    if held is not None:
        slots = torch.cat([held.to(x.dtype), slots[:, held.shape[1] :]], dim=1)
    return slots.scatter(1, place[..., None, None].expand(-1, -1, *x.shape[2:]), x)


def block_oracle(q: Tensor, k: Tensor, v: Tensor, *, block: int, weights: Weights = "softmax", bidirectional: bool = False) -> Tensor:
    """`attend_blocks` of a whole sequence with one N x N mask."""
    i = torch.arange(q.shape[2], device=q.device)
    mask = i[:, None] // block == i // block
    return block_weights(q, k, v, mask if bidirectional else mask & (i[:, None] >= i), weights).to(q.dtype)
