"""A recurrence whose past is parted into buckets of a Fenwick tree, each read with a weight of its own (log-linear-attention).

    level(t, s) = number of bits of t xor s:   0 for the token itself, l + 1 for the bucket of 2^l tokens that holds s
    o_t = sum_{s<=t} lambda_t^(level(t, s)) A_ts v_s,     A: the weights of the host recurrence (decay, delta rule)
        = sum_l lambda_t^(l) (S_t^(l))^T q_t,             S^(l): the host's state of the bucket of level l

As t grows a bucket keeps its level or joins a larger one, so that the states are carried from section to section of the sequence: every
section runs the host once, over the columns of an identity (which gives A inside the section, and what its tokens add to a state) and
over the columns of all states (which gives what they are read as, and what is left of them). Time O(N log N), state O(log N).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core import Call
from saccade.ops.scan import scan

SECTION = 64


def level(t: Tensor, s: Tensor, levels: int) -> Tensor:
    """Level of source s for query t (int64, broadcast), the last one for all that would lie higher."""
    return torch.frexp((t ^ s).double()).exponent.long().clamp(max=levels - 1)


def fenwick(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, held: Tensor | None, call: Call, *, section: int = SECTION, **host: Any
) -> tuple[Tensor, Tensor]:
    """(out `(B, H, N, Dv)`, states `(B, L, H, D, Dv)`) of q `(B, H, N, D)`, k, v with heads that divide H, weights lambda `(B, H, N, L)`
    and the states held before. host: log_decay, beta, scale as in `saccade.ops.scan`. Tokens that are not real come with k, beta, decay 0.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype, (q, k, v) = q.dtype, (x.to(wide) for x in (q, k, v))
    b, heads, n, d = q.shape
    levels, width = weights.shape[-1], v.shape[-1]
    # what no token has reached yet need not be carried along
    used = min(levels, max(int(call.ends.max()) - 1, 0).bit_length() + 1)
    states = q.new_zeros(b, heads, d, used, width) if held is None else held[:, :used].to(wide).permute(0, 2, 3, 1, 4)
    lengths = torch.full_like(call.start, n) if call.lengths is None else call.lengths
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    outs = []
    for begin in range(0, n, section):
        end = min(begin + section, n)
        part = {name: _part(x, begin, end) for name, x in host.items()}
        places = call.start[:, None] + torch.arange(begin, end, device=q.device)
        first, after = (call.start + lengths.clamp(max=edge) for edge in (begin, end))
        own = torch.eye(end - begin, dtype=wide, device=q.device).expand(b, 1, -1, -1)
        columns = torch.cat([own, own.new_zeros(b, 1, end - begin, used * width)], dim=-1)
        before = torch.cat([states.new_zeros(b, heads, d, end - begin), states.flatten(3)], dim=-1)
        run, left = scan(q[:, :, begin:end], k[:, :, begin:end], columns, initial_state=before, **part)
        assert isinstance(left, Tensor)
        inside, read = run.split([end - begin, used * width], dim=-1)
        added, moved = left.split([end - begin, used * width], dim=-1)
        lam, new = weights[:, :, begin:end].to(wide), v[:, :, begin:end]
        sources = _sources(first, used)
        near = lam.gather(-1, level(places[:, :, None], places[:, None], levels).unsqueeze(1).expand(-1, heads, -1, -1))
        far = lam.gather(-1, _held_levels(places, sources, levels).unsqueeze(1).expand(-1, heads, -1, -1))
        outs.append((inside * near) @ new + (read.unflatten(-1, (used, width)) * far.unsqueeze(-1)).sum(-2))
        last = (after - 1).clamp(min=0)[:, None]
        merge = _one_hot(_held_levels(last, sources, levels).squeeze(1), used, wide)
        fresh = _one_hot(level(last, places, levels), used, wide)
        joined = torch.einsum("blm,bhdlv->bhdmv", merge, moved.unflatten(-1, (used, width)))
        states = joined + (added @ (new.unsqueeze(-2) * fresh[:, None, :, :, None]).flatten(-2)).unflatten(-1, (used, width))
    kept = states.permute(0, 3, 1, 2, 4)
    return torch.cat(outs, dim=2).to(dtype), torch.cat([kept, kept.new_zeros(b, levels - used, heads, d, width)], dim=1)


def _sources(first: Tensor, used: int) -> Tensor:
    """One token of each bucket of the `first` `(B,)` tokens: `(B, L)`. In that of level l + 1, bit l of the last token is cleared."""
    last = (first - 1).clamp(min=0)[:, None]
    bits = torch.cat([torch.zeros(1, dtype=torch.int64), 2 ** torch.arange(used - 1)]).to(first.device)
    return last & ~bits


def _held_levels(t: Tensor, sources: Tensor, levels: int) -> Tensor:
    """Levels of the buckets `(B, L)` for queries t `(B, N)`: `(B, N, L)`."""
    found = level(t[:, :, None], sources[:, None], levels)
    if sources.shape[1] == levels:
        # the last bucket holds all that would lie higher, and what is there stays there
        found = torch.cat([found[..., :-1], torch.full_like(found[..., -1:], levels - 1)], dim=-1)
    return found


def _one_hot(index: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return (index.unsqueeze(-1) == torch.arange(size, device=index.device)).to(dtype)


def _part(x: Any, begin: int, end: int) -> Any:
    return x[:, :, begin:end] if isinstance(x, Tensor) and x.ndim > 1 else x
