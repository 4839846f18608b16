"""Softmax attention in a sliding window, exact at the token, with the last keys of every row as its state.

Query i sees keys j with `i - w < j <= i`, and the first `sinks` tokens always. Queries are cut into blocks of w: over its own block a
query is causal, over the w - 1 keys before it sees those with a larger index than its own, so two triangles make up the band and cost and
memory are linear in the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saccade.core import Call, Partial
from saccade.ops import attend
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.tokens import last_tokens

NEVER = torch.iinfo(torch.int32).max  # the position of a key that no query sees


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, past: Mapping[str, Any], call: Call, *, window: int, sinks: int = 0, scale: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(out `(B, Hq, N, Dv)`, what to keep) of q `(B, Hq, N, D)`, k `(B, Hk, N, D)`, v `(B, Hk, N, Dv)` behind the tokens in `past`.

    window: keys a query sees, its own among them, at least 1. sinks: first tokens that stay visible. Kept: "k" and "v"
    `(B, window - 1, Hk, D)` of the last tokens, "first_k" and "first_v" `(B, sinks, Hk, D)`: as many bytes at every length.
    """
    n = q.shape[2]
    before = [_tokens(x, past.get(name), window - 1) for x, name in ((k, "k"), (v, "v"))]
    slots = torch.arange(window - 1, device=q.device)
    empty = slots < (window - 1 - call.start)[:, None]
    firsts: list[Tensor] = []
    if sinks:
        firsts = [_first(past.get(name), x.transpose(1, 2), call, sinks) for x, name in ((k, "first_k"), (v, "first_v"))]
    places = call.start[:, None] + torch.arange(n, device=q.device)
    if n == 1:
        out = _one(q, k, v, before, empty, firsts, places, window, scale)
    else:
        out = _many(q, k, v, before, empty, firsts, places, window, scale)
    kept: dict[str, Tensor] = {}
    if call.keep:
        kept = {name: last_tokens(old, x.transpose(1, 2), call.lengths) for name, old, x in zip("kv", before, (k, v), strict=True)}
        kept |= dict(zip(("first_k", "first_v"), firsts, strict=False))
    return out, kept


def _tokens(x: Tensor, held: Tensor | None, n: int) -> Tensor:
    return x.new_zeros(x.shape[0], n, x.shape[1], x.shape[3]) if held is None else held.to(x.dtype)


def _first(held: Tensor | None, new: Tensor, call: Call, n: int) -> Tensor:
    """The first n tokens of every row, as far as they have come; held `(B, n, H, D)` those of before, new `(B, N, H, D)`."""
    held = new.new_zeros(new.shape[0], n, *new.shape[2:]) if held is None else held.to(new.dtype)
    slot = torch.arange(n, device=new.device)
    start = call.start[:, None]
    index = torch.where(slot < start, slot, (n + slot - start).clamp(max=n + new.shape[1] - 1))
    return torch.cat([held, new], dim=1).gather(1, index[..., None, None].expand(-1, -1, *new.shape[2:]))


def _one(
    q: Tensor, k: Tensor, v: Tensor, before: list[Tensor], empty: Tensor, firsts: list[Tensor], places: Tensor, window: int,
    scale: float | None,
) -> Tensor:  # fmt: skip
    keys, values = (torch.cat([old.transpose(1, 2), new], dim=2) for old, new in zip(before, (k, v), strict=True))
    seen = torch.cat([~empty, torch.ones_like(empty[:, :1]) if window > 1 else places >= 0], dim=1)
    if firsts:
        keys, values = (torch.cat([first.transpose(1, 2), x], dim=2) for first, x in zip(firsts, (keys, values), strict=True))
        seen = torch.cat([torch.arange(firsts[0].shape[1], device=q.device) <= places - window, seen], dim=1)
    return partial_softmax(q, keys, values, seen[:, None, None], scale=scale).out.to(q.dtype)


def _many(
    q: Tensor, k: Tensor, v: Tensor, before: list[Tensor], empty: Tensor, firsts: list[Tensor], places: Tensor, window: int,
    scale: float | None,
) -> Tensor:  # fmt: skip
    b, n = q.shape[0], q.shape[2]
    # no block is longer than the sequence; then all that a query sees before it lies in `before`
    size = min(window, n)
    blocks = -(-n // size)
    mine, own_k, own_v = (_fold(x, size, blocks) for x in (q, k, v))
    part = attend(mine, own_k, own_v, causal=True, scale=scale, return_lse=window > 1 or bool(firsts))
    if window > 1:
        index = torch.arange(size, device=q.device)
        slots = torch.arange(window - 1, device=q.device)
        earlier = []
        for old, new in zip(before, (k, v), strict=True):
            joined = torch.cat([old, new.transpose(1, 2)], dim=1)[:, : (blocks - 1) * size + window - 1]
            earlier.append(joined.unfold(1, window - 1, size).permute(0, 1, 2, 4, 3).flatten(0, 1))
        # the key in slot j is seen by queries up to the j-th: in negated positions, by those not before it
        held = (-slots).expand(b, blocks, -1).clone()
        late = torch.arange(blocks, device=q.device)[:, None] * size + slots
        gone = (late < window - 1) & empty.gather(1, late.flatten().clamp(max=window - 2).expand(b, -1)).unflatten(1, (blocks, -1))
        held = held.masked_fill(gone, NEVER)
        part = attend(
            mine, earlier[0], earlier[1], causal=True, scale=scale, return_lse=True, q_positions=-index[None, None],
            k_positions=held.flatten(0, 1).unsqueeze(1), state=part,
        )  # fmt: skip
    out = part.out.unflatten(0, (b, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :n]
    if not firsts:
        return out
    lse = part.lse
    assert lse is not None
    rest = Partial(out, lse.unflatten(0, (b, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :n])
    keys, values = (x.transpose(1, 2) for x in firsts)
    order = torch.arange(keys.shape[2], device=q.device)[None, None]
    return attend(q, keys, values, causal=True, scale=scale, q_positions=(places - window).unsqueeze(1), k_positions=order, state=rest).out


def _fold(x: Tensor, size: int, blocks: int) -> Tensor:
    """`(B, H, N, D)` as `(B * blocks, H, size, D)`, zeros after the end."""
    x = torch.nn.functional.pad(x, (0, 0, 0, blocks * size - x.shape[2]))
    return x.unflatten(2, (blocks, size)).transpose(1, 2).flatten(0, 1)
