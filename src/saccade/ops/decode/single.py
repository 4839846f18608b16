"""One query over listed keys: all heads together, no loop over tiles, and nothing read that is not listed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import Partial, Selection
from saccade.ops.attend.gather import KeyRows
from saccade.ops.attend.problem import Problem
from saccade.ops.decode.scratch import as_exact, scratch

RAGGED = 0.75  # below this filling of the padded lists, padding costs more than running the heads one by one
CHUNK = 4 << 20  # bytes of keys gathered at a time, unless one list has more: they are read again while still in
cache


class Ends(NamedTuple):
    """The greatest last entry of the lists' tile starts and of their single keys, -1 where there are none.

    Lists are sorted and hold n_k past their counts, so an end of n_k says that some list is shorter than others.
    """

    start: int
    token: int

    @classmethod
    def of(cls, s: Selection) -> Ends:
        return cls(*(int(ids[..., -1].max()) if ids.shape[-1] else -1 for ids in (s.starts, s.tokens)))


def covers_all(s: Selection, ends: Ends) -> bool:
    """Whether the lists name every key of a cache, told from their lengths alone."""
    if s.log_weight is not None or max(ends) >= s.n_k:
        return False
    tiles = s.starts.shape[-1] * s.block_k
    return s.aligned if tiles >= s.n_k else tiles == 0 and s.tokens.shape[-1] == s.n_k


def takes(problem: Problem, ends: Ends) -> bool:
    """Whether `attend` below is the right way: one query, no gradients, lists of about one length, a tile of keys."""
    s = problem.selection
    assert s is not None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (problem.q, problem.k, problem.v))
    longest = s.starts.shape[-1] * s.block_k + s.tokens.shape[-1]
    if problem.q.shape[2] != 1 or needs_grad or longest == 0 or (ends.start >= 0 and s.n_k < s.block_k):
        return False
    if max(ends) < s.n_k:
        return True
    return float((s.start_counts * s.block_k + s.token_counts).float().mean()) >= RAGGED * longest


def attend(problem: Problem, ends: Ends) -> Partial:
    """Attention of q `(B, Hq, 1, D)` over `problem.selection`; float32 arithmetic (float64 for float64 inputs)."""
    s, q, layout = problem.selection, problem.q, problem.layout
    assert s is not None
    batch, heads, _, dim = q.shape
    # lists shared by a group: its queries become rows over the same gathered keys
    lists = layout.kv_heads if layout.kv_heads % s.heads == 0 else heads
    starts, tokens = _spread(s.starts, batch, lists), _spread(s.tokens, batch, lists)
    weight = None if s.log_weight is None else _spread(s.log_weight, batch, lists).unsqueeze(1)
    k_source, v_source = KeyRows(problem.k, problem.v, heads=lists, group=lists // layout.kv_heads).sources
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(batch * lists, heads // lists, dim).to(exact)
    singles_from = starts.shape[-1] * s.block_k
    step = max(1, CHUNK // ((singles_from + tokens.shape[-1]) * dim * exact.itemsize))
    real = _real(starts, tokens, s) if ends.start > s.n_k - s.block_k or ends.token >= s.n_k else None
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for begin in range(0, batch * lists, step):
        part = slice(begin, begin + step)
        k = _gather(k_source, starts[part], tokens[part], part, s, exact)
        logits = problem.logits(rows[part] @ k.mT)
        if weight is not None:
            logits[..., singles_from:] += weight[part]
        if real is not None:
            logits = logits.masked_fill(~real[part].unsqueeze(1), -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        if real is not None or weight is not None:
            # a head without any key is 0 by policy, where softmax over nothing gives nan
            weights = weights.masked_fill(logits == -torch.inf, 0.0)
        # the buffer that held the keys gets the values
        v = _gather(v_source, starts[part], tokens[part], part, s, exact)
        if real is not None:
            _blank(v, real[part])
        outs.append(weights @ v)
        if problem.return_lse:
            lses.append(torch.logsumexp(logits, dim=-1))
    out, lse = (torch.cat(x) if len(x) > 1 else (x[0] if x else None) for x in (outs, lses))
    assert out is not None
    return Partial(out.view(batch, heads, 1, -1).to(q.dtype), None if lse is None else lse.view(batch, heads, 1))


def _spread(x: Tensor, batch: int, lists: int) -> Tensor:
    """`(B or 1, H, 1, M)` to `(B * lists, M)`."""
    x = x.squeeze(2)
    if x.shape[1] not in (1, lists):
        x = x.repeat_interleave(lists // x.shape[1], dim=1)
    return x.expand(batch, lists, -1).reshape(batch * lists, x.shape[-1])


def _gather(
    source: tuple[Tensor, Tensor, int], starts: Tensor, tokens: Tensor, part: slice, s: Selection, exact: torch.dtype
) -> Tensor:
    """Rows `(lists of the part, M * block_k + M', D)` in dtype `exact`; entries past a count give some key."""
    flat, base, step = source
    base, dim = base.flatten()[part, None], flat.shape[-1]
    singles_from = starts.shape[-1] * s.block_k
    out = scratch("rows", (base.shape[0], singles_from + tokens.shape[-1], dim), flat.dtype, flat.device)
    if singles_from:
        starts = starts.clamp(max=s.n_k - s.block_k)  # see _real
        if step == 1:
            # a tile is one run of memory, copied as one row of a view in which a run starts at every key
            width = s.block_k * dim
            runs = flat.as_strided((flat.shape[0] - s.block_k + 1, width), (dim, 1), flat.storage_offset())
            _pick(runs, starts + base, out[:, :singles_from], width)
        else:
            ids = (starts.unsqueeze(-1) + torch.arange(s.block_k, device=starts.device)).flatten(-2)
            _pick(flat, ids * step + base, out[:, :singles_from], dim)
    if tokens.shape[-1]:
        _pick(flat, tokens.clamp(max=s.n_k - 1) * step + base, out[:, singles_from:], dim)
    return as_exact(out, exact, "exact rows")


def _pick(rows: Tensor, index: Tensor, out: Tensor, width: int) -> None:
    """Copy `rows[index]` to `out (lists, n, D)`, seen as rows of `width` channels."""
    if out.is_contiguous():
        torch.index_select(rows, 0, index.flatten(), out=out.view(-1, width))
    else:  # tiles and single keys stand next to each other in every list
        out.copy_(rows.index_select(0, index.flatten()).view(out.shape))


def _real(starts: Tensor, tokens: Tensor, s: Selection) -> Tensor:
    """`(B * lists, gathered keys)` bool, False for what is gathered but isn't listed.

    A tile that would reach past the last key is gathered from block_k keys before the end instead, so that no memory
    behind the cache is touched: its keys from before its own start don't count (none counts for an entry past its
    list's count).
    """
    first = starts.unsqueeze(-1)
    inside = first.clamp(max=s.n_k - s.block_k) + torch.arange(s.block_k, device=starts.device) >= first
    return torch.cat([inside.flatten(-2), tokens < s.n_k], dim=-1)


def _blank(v: Tensor, real: Tensor) -> None:
    """Zero the rows that aren't listed: their weight is 0, but 0 times a nan or infinity that may stand there is nan."""
    first = int(real.all(0).to(torch.uint8).argmin())  # mostly the last tile alone is short
    v[:, first:].masked_fill_(~real[:, first:].unsqueeze(-1), 0.0)
