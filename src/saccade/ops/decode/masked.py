"""One query whose lists name most of a cache: all keys are read in a row under a mask, which costs less than gathering rows one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial, Selection
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.tile import cpu_flash
from saccade.ops.decode.listed import Ends

SHARE = 0.8  # rows to gather, out of those that the cache has, from which on reading all of them is faster
LEAST = 4096  # rows of a cache worth the question


def takes(problem: Problem, ends: Ends) -> bool:
    """Whether `attend` below is the faster way. float32 and float64 alone: torch's kernel rounds weights of half precision."""
    s, q, v, layout = problem.selection, problem.q, problem.v, problem.layout
    assert s is not None
    rows = layout.kv_heads * s.n_k
    if q.device.type != "cpu" or rows < LEAST or problem.softcap is not None or q.dtype not in (torch.float32, torch.float64):
        return False
    if q.shape[-1] != v.shape[-1] or (torch.is_grad_enabled() and any(x.requires_grad for x in (q, problem.k, v))):
        return False
    # a list shared by a group is gathered once
    lists = layout.kv_heads if layout.kv_heads % s.heads == 0 else layout.query_heads
    longest = s.starts.shape[-1] * s.block_k + s.tokens.shape[-1]
    if lists * longest < SHARE * rows:
        return False
    return max(ends) < s.n_k or lists * float((s.start_counts * s.block_k + s.token_counts).double().mean()) >= SHARE * rows


def attend(problem: Problem) -> Partial | None:
    """Attention of q `(B, Hq, 1, D)` over `problem.selection`; None where only gathering keeps what is not listed out of the result.

    That is, where a key or a value which is not listed is nan or infinite, and where a list is empty.
    """
    s, q, layout = problem.selection, problem.q, problem.layout
    assert s is not None
    added = _mask(s, q.dtype)
    # the kernel has an answer of its own for a row that sees nothing
    if bool((s.start_counts + s.token_counts == 0).any() if s.log_weight is None else (added == -torch.inf).all(-1).any()):
        return None
    added = added.view(added.shape[0], layout.kv_heads, -1, s.n_k) if s.heads == layout.query_heads else added.unsqueeze(2)
    added = added.expand(-1, layout.kv_heads, layout.group, -1)
    out, lse = cpu_flash(layout.to_groups(q.squeeze(2)), problem.k, problem.v, problem.scale, added=added)
    if not bool(torch.isfinite(out).all()):
        return None
    return Partial(out.flatten(1, 2).unsqueeze(2), lse.flatten(1, 2).unsqueeze(2) if problem.return_lse else None)


def _mask(s: Selection, dtype: torch.dtype) -> Tensor:
    """What is added to the logits, `(B or 1, H, n_k)`: the weight of what is listed, -inf for the rest."""
    # entries past a list's end share one more column, which is cut off
    room = torch.full((*s.starts.shape[:2], s.n_k + 1), -torch.inf, dtype=dtype)
    if s.starts.shape[-1]:
        tiles = (s.starts.squeeze(2).long().unsqueeze(-1) + torch.arange(s.block_k)).flatten(2)
        room.scatter_(-1, tiles.clamp_(max=s.n_k), 0.0)
    if s.tokens.shape[-1]:
        tokens = s.tokens.squeeze(2).long()
        if s.log_weight is None:
            room.scatter_(-1, tokens, 0.0)
        else:
            room.scatter_(-1, tokens, s.log_weight.squeeze(2).to(dtype))
    return room[..., : s.n_k]
