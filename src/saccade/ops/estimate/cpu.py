"""The estimates that look at every logit, on a CPU: one head and some rows at a time, so that their logits stay in cache, and only the
keys that these rows see.

Keys are laid out so that the first keys of all tiles come first, then all second ones, and so on. Logits are then `(block_k, rows, T)`, and
reducing over a tile is adding up, or comparing, whole rows of T numbers, where neighbouring numbers would be reduced one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.estimate import reference
from saccade.ops.estimate.common import TileGrid, exact
from saccade.ops.estimate.cpu_maxima import by_products
from saccade.ops.scratch import scratch

HELD = 1 << 20  # logits at a time


class Rows(NamedTuple):
    """Logits `(block_k, rows, T)` of query rows begin ... end - 1 of a head with the first T key tiles; -inf where a key is not seen."""

    batch: int
    head: int
    begin: int
    end: int
    logits: Tensor


def score_rows(
    q: Tensor, k: Tensor, grid: TileGrid, offset: int, scale: float, softcap: float, columns: Tensor | None = None,
    seen: Tensor | None = None,
) -> Iterator[Rows]:  # fmt: skip
    """Whole tiles of query rows, all heads. columns: `(B, Hq, Nk)`, added to q.k before the scale. seen: bool `(Tq, Tk)`, tiles that are
    looked at. The logits are the caller's until the next step."""
    wide, (batch, heads), kv_heads = exact(q), q.shape[:2], k.shape[1]
    reach = _reach(grid, offset, seen)
    size = grid.block_k
    laid = pad(k.to(wide), (0, 0, 0, -grid.n_k % size)).unflatten(2, (-1, size)).transpose(2, 3).contiguous()
    if columns is not None:
        more = pad(columns.to(wide), (0, -grid.n_k % size)).unflatten(2, (-1, size)).transpose(2, 3)
    for b in range(batch):
        for h in range(heads):
            own, rows = laid[b, h // (heads // kv_heads)], q[b, h].to(wide) * scale
            if columns is not None:
                own, rows = torch.cat([own, more[b, h].unsqueeze(-1)], -1), pad(rows, (0, 1), value=scale)
            first = 0
            while first < grid.rows:
                # as many tiles of rows as fit
                last = first + 1
                while last < grid.rows and (last + 1 - first) * grid.block_q * size * max(reach[first : last + 1]) <= HELD:
                    last += 1
                begin, end, tiles = first * grid.block_q, min(last * grid.block_q, grid.n_q), max(reach[first:last])
                logits = scratch("estimate.logits", (size, end - begin, tiles), wide, q.device)
                torch.bmm(rows[begin:end].expand(size, -1, -1), own[:, :tiles].mT, out=logits)
                if softcap:
                    logits.div_(softcap).tanh_().mul_(softcap)
                _hide(logits, grid, begin, end, offset)
                if seen is not None:
                    hidden = ~seen[first:last, :tiles].repeat_interleave(grid.block_q, 0)
                    logits.masked_fill_(hidden[: end - begin], -torch.inf)
                yield Rows(b, h, begin, end, logits)
                first = last


def _reach(grid: TileGrid, offset: int, seen: Tensor | None) -> list[int]:
    """For each tile of rows, how many key tiles, the first ones, it looks at."""
    ends = [min((tile + 1) * grid.block_q, grid.n_q) for tile in range(grid.rows)]
    keys = [min(max(offset + end, 0), grid.n_k) if grid.causal else grid.n_k for end in ends]
    reach = [-(-n // grid.block_k) for n in keys]
    if seen is None:
        return reach
    numbers = torch.arange(1, grid.columns + 1) * seen
    return [min(a, b) for a, b in zip(reach, numbers.amax(1).tolist(), strict=True)] if grid.columns else reach


def _hide(logits: Tensor, grid: TileGrid, begin: int, end: int, offset: int) -> None:
    """-inf for keys after a row's own, and for those that only fill up the last tile."""
    size, _, tiles = logits.shape
    # the first key that some row does not see
    first = grid.n_k if not grid.causal else min(grid.n_k, max(offset + begin + 1, 0))
    clear = first // size
    if clear >= tiles:
        return
    keys = torch.arange(size, device=logits.device).unsqueeze(-1) + torch.arange(clear, tiles, device=logits.device) * size
    last = torch.full((end - begin,), grid.n_k - 1, device=logits.device)
    if grid.causal:
        last = torch.minimum(last, torch.arange(begin, end, device=logits.device) + offset)
    logits[:, :, clear:].masked_fill_(keys.unsqueeze(1) > last.view(1, -1, 1), -torch.inf)


@torch.no_grad()
def tile_maxima(
    q: Tensor, k: Tensor, grid: TileGrid, *, offset: int, scale: float, softcap: float, relative_to: Tensor | None, bits: int | None,
    group: int, smooth: bool, reach: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `saccade.ops.estimate.tile_maxima`; what is beyond `reach` may be left out. Only a cap needs logits one by one."""
    a, b, columns = reference.estimated(q, k, bits, group, smooth)
    less = None if relative_to is None else relative_to.to(exact(q))
    if columns is not None:
        k_mean = k.mean(2, dtype=exact(k)).unsqueeze(2)
        own = reference.products(q, k_mean).squeeze(-1)
        if softcap:  # what a row has in common is inside of the cap
            a, b = torch.cat([a, own.unsqueeze(-1)], -1), pad(b, (0, 1), value=1.0)
        else:
            less = -own * scale if less is None else less - own * scale
    if not softcap:
        return by_products(a, b, grid, offset, scale, less, columns, reach)
    found = q.new_full((*q.shape[:2], grid.rows, grid.columns), -torch.inf, dtype=exact(q))
    for at in score_rows(a, b, grid, offset, scale, softcap, columns):
        reduced = at.logits.amax(0)
        if less is not None:
            reduced -= less[at.batch, at.head, at.begin : at.end].unsqueeze(-1)
        _put(found, at, grid, reduced, False)
    return found


@torch.no_grad()
def pooled_probabilities(
    q: Tensor, k: Tensor, grid: TileGrid, *, offset: int, scale: float, softcap: float, total: bool, seen: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Softmax probabilities over each tile, their sum or with `total` False the largest: `(B, Hq, Tq, Tk)`. Logits are worked out once.
    seen: bool `(Tq, Tk)`, tiles that take part."""
    found = q.new_zeros((*q.shape[:2], grid.rows, grid.columns), dtype=exact(q))
    for at in score_rows(q, k, grid, offset, scale, softcap, seen=seen):
        if not at.logits.shape[2]:
            continue
        best = at.logits.amax(0)
        top = best.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)  # of a row that sees nothing
        sums = at.logits.sub_(top).exp_().sum(0)
        reduced = sums if total else best.sub_(top).exp_()
        mass = sums.sum(-1, keepdim=True)
        _put(found, at, grid, reduced / mass.masked_fill(mass == 0, 1.0), total)
    return found


def _put(found: Tensor, at: Rows, grid: TileGrid, reduced: Tensor, total: bool) -> None:
    """What was reduced over tiles of keys, `(rows, T)`, reduced over tiles of rows too."""
    short = -reduced.shape[0] % grid.block_q
    tiled = pad(reduced, (0, 0, 0, short), value=0.0 if total else -torch.inf).unflatten(0, (-1, grid.block_q))
    first = at.begin // grid.block_q
    found[at.batch, at.head, first : first + tiled.shape[0], : tiled.shape[2]] = tiled.sum(1) if total else tiled.amax(1)


@torch.no_grad()
def row_sums(
    q: Tensor, k: Tensor, limits: Tensor, first: int | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `reference.row_sums`."""
    n, wide, (batch, heads, m, _) = k.shape[2], exact(q), q.shape
    columns = torch.zeros(batch, heads, n, dtype=wide)
    diagonals = None if first is None else torch.zeros_like(columns)
    lse = torch.full((batch, heads, m), -torch.inf, dtype=wide)
    ends = limits.clamp(0, n).tolist()
    for b in range(batch):
        for h in range(heads):
            keys, rows = k[b, h // (heads // k.shape[1])].to(wide), q[b, h].to(wide) * scale
            begin = 0
            while begin < m:
                end = min(m, begin + max(1, HELD // max(1, max(ends[begin:]))))
                seen, common = max(ends[begin:end]), min(ends[begin:end])
                p = _weights(rows[begin:end], keys[:seen], limits[begin:end], common, softcap, lse[b, h, begin:end])
                columns[b, h, :seen] += p.sum(0)
                if diagonals is not None and first is not None:
                    _add_diagonals(diagonals[b, h], p, first + begin)
                begin = end
    return columns, diagonals, lse


def _weights(q: Tensor, k: Tensor, limits: Tensor, common: int, softcap: float, lse: Tensor) -> Tensor:
    """Softmax rows `(m, n)` of q `(m, D)`, and their log-sum-exp in `lse (m,)`. common: keys that all rows see."""
    z = torch.mm(q, k.mT, out=scratch("estimate.logits", (q.shape[0], k.shape[0]), q.dtype, q.device))
    if not z.shape[1]:
        return z
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    if common < z.shape[1]:
        keys = torch.arange(common, z.shape[1])
        z[:, common:].masked_fill_(keys >= limits.unsqueeze(-1), -torch.inf)
    top = z.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    p = z.sub_(top).exp_()
    mass = p.sum(-1, keepdim=True)
    lse.copy_((mass.log() + top).squeeze(-1))
    return p.div_(mass.masked_fill(mass == 0, 1.0))


def _add_diagonals(diagonals: Tensor, p: Tensor, first: int) -> None:
    """Adds rows p `(m, n)` of queries first ... first + m - 1 to `diagonals (N,)` at `position - key`."""
    m, n = p.shape
    if not n:
        return
    # turned round, a row's neighbour below is one place further; rows that are one shorter than they lie apart line that up
    room = p.new_zeros(m, n + m)
    room[:, :n] = p.flip(-1)
    sums = room.as_strided((m, n + m - 1), (n + m - 1, 1)).sum(0)
    begin = first - n + 1  # the offset of the first of them; keys after a row's own weigh nothing
    lead = max(0, -begin)
    count = min(len(sums), len(diagonals) - begin) - lead
    if count > 0:
        diagonals[begin + lead : begin + lead + count] += sums[lead : lead + count]
