"""Attention maps too large to hold: sums over tiles of tokens, and attention's output with them, in one pass over the scores."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.attend import attend
from saccade.ops.estimate import pooled_probabilities

ROWS = 1024  # query rows of a group's heads that are at work at a time on a CPU
PAIRS = 1 << 19  # score pairs that are: few enough to stay in a cache until all is done with them
LOG2_E = math.log2(math.e)
DECADES = 4  # maps are drawn from a mean mass of 10^-4 to 1


class Whole(NamedTuple):
    """sums `(Hq, Tq, Tk)`: causal softmax probabilities summed over each tile. lse `(Hq, N)`: each row's log-sum-exp. out
    `(1, Hq, N, Dv)`: attention's output, None where no values were given."""

    sums: Tensor
    lse: Tensor
    out: Tensor | None


def tile_sums(
    q: Tensor, k: Tensor, block_q: int, block_k: int, *, scale: float, softcap: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal softmax probabilities summed over each tile, `(Hq, Tq, Tk)`, and each row's log-sum-exp `(Hq, N)`.

    q `(1, Hq, N, D)`, k `(1, Hk, N, D)`. float32 (float64 for float64 inputs); tiles of a row of tiles sum to its rows. On a GPU the
    kernels of `saccade.ops.estimate` and `saccade.ops.attend` do the work, on a CPU `whole`. progress is called with the share done, in
    (0, 1].
    """
    if not q.is_cuda:
        return whole(q, k, None, block_q, block_k, scale=scale, softcap=softcap, progress=progress)[:2]
    found = by_kernels(q, k, block_q, block_k, scale=scale, softcap=softcap)
    if progress is not None:
        progress(1.0)
    return found


def whole(
    q: Tensor, k: Tensor, v: Tensor | None, block_q: int, block_k: int, *, scale: float, softcap: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> Whole:  # fmt: skip
    """What `tile_sums` gives and, where v `(1, Hk, N, Dv)` is given, attention's output: every score is worked out once for both.

    Rows are multiplied out a run at a time, over the keys up to the run's last row only, a piece of the keys after the other.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, n, group = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    sums = torch.zeros(heads, math.ceil(n / block_q), math.ceil(n / block_k), dtype=wide, device=q.device)
    lse = torch.empty(heads, n, dtype=wide, device=q.device)
    out = None if v is None else q.new_empty(1, heads, n, v.shape[-1])
    keys, values = k[0].to(wide), None if v is None else v[0].to(wide)
    run = max(1, ROWS // (group * block_q)) * block_q
    for begin in range(0, n, run):
        end = min(n, begin + run)
        for kv_head in range(k.shape[1]):
            own = slice(kv_head * group, (kv_head + 1) * group)
            part = _run(
                q[0, own, begin:end].to(wide) * scale, keys[kv_head, :end], None if values is None else values[kv_head, :end],
                block_q, block_k, softcap,
            )  # fmt: skip
            first = begin // block_q
            sums[own, first : first + part.sums.shape[1], : part.sums.shape[2]] = part.sums
            lse[own, begin:end] = part.lse
            if out is not None and part.out is not None:
                out[0, own, begin:end] = part.out.to(out.dtype)
        if progress is not None:
            # a run costs its rows times the keys they see
            progress((end / n) ** 2)
    return Whole(sums, lse, out)


def by_kernels(q: Tensor, k: Tensor, block_q: int, block_k: int, *, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """`tile_sums` by the ops, which have kernels for GPUs; their plain-torch forms are much slower on a CPU than what is done here."""
    sums = pooled_probabilities(q, k, block_q, block_k, scale=scale, softcap=softcap)[0]
    lse = attend(q, k, k, scale=scale, softcap=softcap, return_lse=True).lse
    assert lse is not None
    return sums, lse[0].to(sums.dtype)


def _run(q: Tensor, k: Tensor, v: Tensor | None, block_q: int, block_k: int, softcap: float | None) -> Whole:
    """`whole` for scaled q `(group, m, D)`, the last m of the rows of k `(n, D)` and v `(n, Dv)`, without the batch."""
    group, m, _ = q.shape
    # in powers of two, which a CPU works out in half the time of those of e
    n, flat = k.shape[0], q.flatten(0, 1) * (LOG2_E if softcap is None else 1.0)
    step = max(1, PAIRS // (group * m * block_k)) * block_k
    top = flat.new_full((group * m, 1), -torch.inf)
    total, out = torch.zeros_like(top), None if v is None else flat.new_zeros(group * m, v.shape[-1])
    places = torch.arange(n - m, n, device=q.device).repeat(group).unsqueeze(-1)
    scores, pieces, tops = flat.new_empty(group * m, min(step, n)), [], []
    for begin in range(0, n, step):
        end = min(n, begin + step)
        z = torch.mm(flat, k[begin:end].mT, out=scores[:, : end - begin] if end - begin == scores.shape[1] else None)
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap * LOG2_E)
        if end > n - m:
            z.masked_fill_(torch.arange(begin, end, device=z.device) > places, -torch.inf)
        highest = torch.maximum(top, z.amax(-1, keepdim=True))
        z.sub_(highest).exp2_()
        shrink = (top - highest).exp2_()
        tiles = pad(z, (0, -(end - begin) % block_k)) if (end - begin) % block_k else z
        tiles = tiles.unflatten(-1, (-1, block_k)).sum(-1)
        total.mul_(shrink).add_(tiles.sum(-1, keepdim=True))
        if out is not None and v is not None:
            out.mul_(shrink).addmm_(z, v[begin:end])
        pieces.append(tiles)
        tops.append(highest)
        top = highest
    lse = top + total.log2()
    # each piece was taken against the highest score so far
    by_row = torch.cat([tiles * (highest - lse).exp2_() for tiles, highest in zip(pieces, tops, strict=True)], dim=-1)
    sums = pad(by_row.view(group, m, -1), (0, 0, 0, -m % block_q)).unflatten(1, (-1, block_q)).sum(2)
    return Whole(sums, lse.view(group, m) / LOG2_E, None if out is None else out.div_(total).view(group, m, -1))


def pool_sums(sums: Tensor, rows: int, columns: int) -> Tensor:
    """Tile sums `(H, Tq, Tk)` over larger tiles, of `rows` x `columns` of the given ones; the last may be smaller."""
    grown = pad(sums, (0, -sums.shape[2] % columns, 0, -sums.shape[1] % rows))
    return grown.unflatten(2, (-1, columns)).sum(-1).unflatten(1, (-1, rows)).sum(2)


def row_counts(n: int, tile: int) -> Tensor:
    """Tokens in each run of `tile`, int64 `(ceil(n / tile),)`."""
    return (n - torch.arange(0, n, tile)).clamp(max=tile)


def log_scaled(mass: Tensor) -> Tensor:
    """A query's mean attention mass on a key tile, 10^-DECADES ... 1, to 0 ... 1."""
    return (1 + mass.clamp(min=10.0**-DECADES).log10() / DECADES).clamp(0, 1)


def as_bytes(share: Tensor) -> str:
    """Shares in [0, 1] as base64 of uint8, row by row."""
    return base64.b64encode(bytes((share * 255).round().long().flatten().tolist())).decode("ascii")
