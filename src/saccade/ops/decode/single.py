"""One query over listed keys: all heads together, no loop over tiles, and nothing read that is not listed."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial, Selection
from saccade.ops.attend.problem import Problem
from saccade.ops.decode.listed import BAGGED, Ends, Listed, copies
from saccade.ops.scratch import as_exact

RAGGED = 0.75  # below this filling of the padded lists, padding costs more than running the lists one by one
CHUNK = 4 << 20  # bytes of keys gathered at a time, but a list for each thread at least: they are read again while still in cache


def covers_all(s: Selection, ends: Ends) -> bool:
    """Whether the lists name every key of a cache, told from their lengths alone."""
    if s.log_weight is not None or max(ends) >= s.n_k:
        return False
    tiles = s.starts.shape[-1] * s.block_k
    return s.aligned if tiles >= s.n_k else tiles == 0 and s.tokens.shape[-1] == s.n_k


def takes(problem: Problem, ends: Ends) -> bool:
    """Whether `attend` below is the right way: one query, no gradients, a tile of keys, and lists of about one length or single keys."""
    s = problem.selection
    assert s is not None
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (problem.q, problem.k, problem.v))
    longest = s.starts.shape[-1] * s.block_k + s.tokens.shape[-1]
    if problem.q.shape[2] != 1 or needs_grad or longest == 0 or (ends.start >= 0 and s.n_k < s.block_k):
        return False
    return max(ends) < s.n_k or _single_keys(problem) or not _ragged(s)


def _ragged(s: Selection) -> bool:
    longest = s.starts.shape[-1] * s.block_k + s.tokens.shape[-1]
    return float((s.start_counts * s.block_k + s.token_counts).float().mean()) < RAGGED * longest


def _single_keys(problem: Problem) -> bool:
    """Whether lists are read key by key, and so can be read without what fills the shorter ones up."""
    s, given = problem.selection, (problem.k, problem.v)
    assert s is not None
    return s.starts.shape[-1] * s.block_k <= s.tokens.shape[-1] and all(x.dtype in BAGGED and not x.is_cuda for x in given)


def attend(problem: Problem, ends: Ends) -> Partial:
    """Attention of q `(B, Hq, 1, D)` over `problem.selection`; float32 arithmetic (float64 for float64 inputs)."""
    s, q, layout = problem.selection, problem.q, problem.layout
    assert s is not None
    batch, heads, _, dim = q.shape
    # lists shared by a group: its queries become rows over the same gathered keys
    lists = layout.kv_heads if layout.kv_heads % s.heads == 0 else heads
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    queries = q.reshape(batch * lists, heads // lists, dim).to(exact)
    listed = Listed.of(s, batch, lists, ends)
    if listed.gaps is not None and not listed.singles_from and _single_keys(problem) and _ragged(s):
        out, lse = _attend_each(problem, queries, listed, exact)
        return Partial(out.view(batch, heads, 1, -1).to(q.dtype), None if lse is None else lse.view(batch, heads, 1))
    # sums of rows by weight are spread over threads list by list
    step = max(torch.get_num_threads(), CHUNK // (listed.length * dim * exact.itemsize))
    if step >= batch * lists:
        out, lse = _attend(problem, queries, listed, exact)
    else:
        parts = [slice(begin, begin + step) for begin in range(0, batch * lists, step)]
        pieces = [_attend(problem, queries[part], listed.only(part), exact) for part in parts]
        out = torch.cat([piece.out for piece in pieces])
        lse = torch.cat([piece.lse for piece in pieces if piece.lse is not None]) if problem.return_lse else None
    return Partial(out.view(batch, heads, 1, -1).to(q.dtype), None if lse is None else lse.view(batch, heads, 1))


def _attend(problem: Problem, queries: Tensor, listed: Listed, exact: torch.dtype) -> Partial:
    """Queries `(R, g, D)` over R lists: out `(R, g, Dv)` and lse `(R, g)`."""
    rows = listed.rows(problem.k)
    keys = listed.gather(rows, exact)
    # the g queries are fewer numbers to scale than their logits
    logits = torch.bmm(queries * problem.scale, keys.mT)
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if listed.weight is not None:
        logits[..., listed.singles_from :] += listed.weight.unsqueeze(1)
    if listed.gaps is not None:
        logits.masked_fill_(listed.gaps.unsqueeze(1), -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    lse = torch.logsumexp(logits, dim=-1) if problem.return_lse else None
    rows = listed.rows(problem.v, like=rows)
    if queries.shape[1] == 1:
        out = listed.weighted_sum(rows, weights.squeeze(1))
        if out is not None and (listed.weight is None or bool(torch.isfinite(out).all())):
            return Partial(out.unsqueeze(1), lse)
    v = listed.gather(rows, exact)  # into the buffer that held the keys
    out = torch.bmm(weights, v)
    if (listed.gaps is not None or listed.weight is not None) and not bool(torch.isfinite(out).all()):
        # what isn't listed has weight 0, but 0 times a nan or infinity standing there is nan
        if listed.gaps is not None:
            v.masked_fill_(listed.gaps.unsqueeze(-1), 0.0)
        # a head without any key is 0 by policy, where softmax over nothing gives nan
        out = torch.bmm(weights.masked_fill(logits == -torch.inf, 0.0), v)
    return Partial(out, lse)


def _attend_each(problem: Problem, queries: Tensor, listed: Listed, exact: torch.dtype) -> Partial:
    """The same over single keys, in lists of their own lengths one behind the other: only logits are filled up."""
    assert listed.gaps is not None
    there = ~listed.gaps
    counts = there.sum(-1).tolist()
    if not any(counts):
        lse = queries.new_full(queries.shape[:2], -torch.inf) if problem.return_lse else None
        return Partial(queries.new_zeros(*queries.shape[:2], problem.v.shape[-1]), lse)
    rows = listed.rows(problem.k)
    keys = as_exact(copies(rows.flat, rows.singles[there]), exact, "exact rows").split(counts)
    logits = queries.new_full((*queries.shape[:2], there.shape[1]), -torch.inf)
    own = (queries * problem.scale).unbind()
    logits.transpose(1, 2)[there] = torch.cat([torch.mm(k, q.mT) for k, q in zip(keys, own, strict=True)])
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
        logits.masked_fill_(listed.gaps.unsqueeze(1), -torch.inf)
    if listed.weight is not None:
        logits += listed.weight.unsqueeze(1)
    # over nothing it is nan, which nobody reads
    weights = torch.softmax(logits, dim=-1).transpose(1, 2)[there]
    lse = torch.logsumexp(logits, dim=-1) if problem.return_lse else None
    rows = listed.rows(problem.v, like=rows)
    index = rows.singles[there]
    if queries.shape[1] == 1 and rows.flat.dtype == exact:
        bags = torch.tensor([0, *itertools.accumulate(counts[:-1])])
        out = F.embedding_bag(index, rows.flat, bags, per_sample_weights=weights.squeeze(-1), mode="sum").unsqueeze(1)
        return Partial(out.to(exact), lse)
    values = as_exact(copies(rows.flat, index), exact, "exact rows").split(counts)
    return Partial(torch.stack([torch.mm(w.mT, v) for w, v in zip(weights.split(counts), values, strict=True)]), lse)
