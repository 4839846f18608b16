"""Gathering implementation: for each query tile the listed keys are gathered and nothing else is touched.

Work and memory traffic follow the selection's density; the largest temporary is one query tile times its own key list.
Plain torch, made for CPUs (few, large calls per tile), runs on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial, Selection
from saccade.ops.attend.gather import KeyRows
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.tile import attend_tile

RAGGED = 0.75  # below this filling of the padded lists, heads are run one by one


def attend(problem: Problem) -> Partial:
    """Attention over `problem.selection`."""
    s, q, layout = problem.selection, problem.q, problem.layout
    assert s is not None
    batch, heads, n_q, _ = q.shape
    # lists shared by a group: its queries become rows of one tile, so keys are gathered once per key/value head
    shared = layout.group > 1 and layout.kv_heads % s.heads == 0
    lists = s.expand(batch, layout.kv_heads if shared else heads)
    queries = layout.to_groups(q) if shared else q.unsqueeze(2)  # (B, lists' heads, rows per position, Nq, D)
    rows = KeyRows(problem.k, problem.v, heads=lists.heads, group=1 if shared else layout.group)
    out = q.new_empty(*queries.shape[:4], problem.v.shape[-1])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.empty(queries.shape[:4], dtype=exact, device=q.device) if problem.return_lse else None
    tile_counts, token_counts = lists.start_counts.cpu(), lists.token_counts.cpu()
    for tile in range(lists.tiles):
        begin, end = tile * s.block_q, min((tile + 1) * s.block_q, n_q)
        for b, h in _head_blocks(tile_counts[:, :, tile], token_counts[:, :, tile], s.block_k):
            ids, ragged = _key_ids(lists, tile, b, h, tile_counts, token_counts)
            if ids.shape[-1] == 0:
                out[b, h, :, begin:end] = 0
                if lse is not None:
                    lse[b, h, :, begin:end] = -torch.inf
                continue
            positions = torch.arange(begin, end, device=q.device) + s.offset
            visible = _visible(ids, ragged, positions if s.causal else None, s.n_k)
            bias = _bias(problem, lists, tile, b, h, ids, begin, end, queries.shape[2])
            k, v = rows.gather(ids, b, h)
            part = attend_tile(
                queries[b, h, :, begin:end].flatten(2, 3), k, v, _over_group(visible, queries.shape[2]), scale=problem.scale,
                softcap=problem.softcap, bias=bias, return_lse=problem.return_lse,
            )  # fmt: skip
            out[b, h, :, begin:end] = part.out.unflatten(2, (queries.shape[2], end - begin))
            if lse is not None and part.lse is not None:
                lse[b, h, :, begin:end] = part.lse.unflatten(2, (queries.shape[2], end - begin))
    return Partial(out.flatten(1, 2), None if lse is None else lse.flatten(1, 2))


def _head_blocks(tile_counts: Tensor, token_counts: Tensor, block_k: int) -> list[tuple[slice, slice]]:
    """(batch, head) slices to run together: all at once when their lists are about equally long, else one by one."""
    keys = tile_counts * block_k + token_counts
    longest = int(tile_counts.max()) * block_k + int(token_counts.max())
    if longest == 0 or float(keys.float().mean()) >= RAGGED * longest:
        return [(slice(None), slice(None))]
    batch, heads = keys.shape
    return [(slice(b, b + 1), slice(h, h + 1)) for b in range(batch) for h in range(heads)]


def _key_ids(
    s: Selection, tile: int, b: slice, h: slice, tile_counts: Tensor, token_counts: Tensor
) -> tuple[Tensor, bool]:
    """Key ids `(b, h, n)` int64 read by a query tile, and whether lists are padded (ids >= n_k are padding)."""
    counts, singles = tile_counts[b, h, tile], token_counts[b, h, tile]
    n_tiles, n_tokens = int(counts.max()), int(singles.max())
    starts = s.starts[b, h, tile, :n_tiles].long()
    ids = (starts.unsqueeze(-1) + torch.arange(s.block_k, device=s.device)).flatten(-2)
    ids = torch.cat([ids, s.tokens[b, h, tile, :n_tokens].long()], dim=-1) if n_tokens else ids
    beyond = n_tiles > 0 and s.n_k % s.block_k != 0 or not s.aligned
    return ids, beyond or bool((counts != n_tiles).any()) or bool((singles != n_tokens).any())


def _visible(ids: Tensor, ragged: bool, positions: Tensor | None, n_k: int) -> Tensor | None:
    """`(b, h, rows, n)` bool, or None when every row sees every id."""
    visible = None
    if positions is not None and bool((ids > positions[0]).any()):
        visible = ids.unsqueeze(-2) <= positions.unsqueeze(-1)
    if ragged and bool((ids >= n_k).any()):
        inside = (ids < n_k).unsqueeze(-2)
        visible = inside if visible is None else visible & inside
    return visible


def _over_group(visible: Tensor | None, group: int) -> Tensor | None:
    """Repeat per-position rows for the queries of a group, which are packed head-major."""
    if visible is None or group == 1 or visible.shape[-2] == 1:
        return visible
    return visible.repeat(1, 1, group, 1)


def _bias(
    problem: Problem, s: Selection, tile: int, b: slice, h: slice, ids: Tensor, begin: int, end: int, group: int
) -> Tensor | None:
    """Additive terms `(b, h, rows of the tile, n)` for the gathered keys: the bias argument and the selection's log weights."""
    total: Tensor | None = None
    if s.log_weight is not None:
        n_tokens = int(s.token_counts[b, h, tile].max())
        total = torch.nn.functional.pad(s.log_weight[b, h, tile, :n_tokens], (ids.shape[-1] - n_tokens, 0)).unsqueeze(-2)
    if problem.bias is None:
        return total
    batch, heads = problem.q.shape[:2]
    bias = problem.bias.expand(batch, heads, -1, -1).unflatten(1, (-1, group))[b, h]
    bias = bias[..., begin:end, :] if bias.shape[-2] > 1 else bias.expand(*bias.shape[:3], end - begin, -1)
    if bias.shape[-1] > 1:
        index = ids.clamp(max=s.n_k - 1)[:, :, None, None, :].expand(*bias.shape[:4], -1)
        bias = torch.gather(bias, -1, index)
    bias = bias.flatten(2, 3)
    return bias if total is None else bias + total
