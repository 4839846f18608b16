"""Attention maps too large to hold: sums over tiles of tokens, in one pass over runs of query rows."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.attend import attend
from saccade.ops.estimate import pooled_probabilities

PAIRS = 1 << 24  # score pairs that are held at a time on a CPU
DECADES = 4  # maps are drawn from a mean mass of 10^-4 to 1


def tile_sums(
    q: Tensor, k: Tensor, block_q: int, block_k: int, *, scale: float, softcap: float | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Causal softmax probabilities summed over each tile, `(Hq, Tq, Tk)`, and each row's log-sum-exp `(Hq, N)`.

    q `(1, Hq, N, D)`, k `(1, Hk, N, D)`. float32 (float64 for float64 inputs); tiles of a row of tiles sum to its rows. On a GPU the
    kernels of `saccade.ops.estimate` and `saccade.ops.attend` do the work; on a CPU rows are multiplied out a run at a time, over the
    keys up to the run's last row only. progress is called with the share done, in (0, 1].
    """
    if q.is_cuda:
        found = by_kernels(q, k, block_q, block_k, scale=scale, softcap=softcap)
        if progress is not None:
            progress(1.0)
        return found
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, n, group = q.shape[1], q.shape[2], q.shape[1] // k.shape[1]
    sums = torch.zeros(heads, math.ceil(n / block_q), math.ceil(n / block_k), dtype=wide, device=q.device)
    lse = torch.empty(heads, n, dtype=wide, device=q.device)
    run = max(1, PAIRS // (group * n * block_q)) * block_q
    for begin in range(0, n, run):
        end = min(n, begin + run)
        for kv_head in range(k.shape[1]):
            own = slice(kv_head * group, (kv_head + 1) * group)
            tiles, row_lse = _rows(q[0, own, begin:end].to(wide) * scale, k[0, kv_head, :end].to(wide), block_q, block_k, softcap)
            first = begin // block_q
            sums[own, first : first + tiles.shape[1], : tiles.shape[2]] = tiles
            lse[own, begin:end] = row_lse
        if progress is not None:
            # a run costs its rows times the keys they see
            progress((end / n) ** 2)
    return sums, lse


def by_kernels(q: Tensor, k: Tensor, block_q: int, block_k: int, *, scale: float, softcap: float | None = None) -> tuple[Tensor, Tensor]:
    """`tile_sums` by the ops, which have kernels for GPUs; their plain-torch forms are much slower on a CPU than what is done here."""
    sums = pooled_probabilities(q, k, block_q, block_k, scale=scale, softcap=softcap)[0]
    lse = attend(q, k, k, scale=scale, softcap=softcap, return_lse=True).lse
    assert lse is not None
    return sums, lse[0].to(sums.dtype)


def _rows(q: Tensor, k: Tensor, block_q: int, block_k: int, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Tile sums `(group, tiles, Tk)` and log-sum-exp `(group, m)` of scaled q `(group, m, D)`, the last m of the rows of k `(n, D)`."""
    group, m, _ = q.shape
    n = k.shape[0]
    z = (q.flatten(0, 1) @ k.mT).view(group, m, n)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z[..., n - m :].masked_fill_(torch.ones(m, m, dtype=torch.bool, device=z.device).triu(1), -torch.inf)
    top = z.amax(-1, keepdim=True)
    z = z.sub_(top).exp_()
    total = z.sum(-1)
    # rows first, as a product with their weights: it reads the run once, and what is left to sum over keys is small
    weights = pad(1 / total, (0, -m % block_q)).unflatten(-1, (-1, 1, block_q))
    z = pad(z, (0, 0, 0, -m % block_q)) if m % block_q else z  # padding copies, even by nothing
    by_key = (weights @ z.unflatten(1, (-1, block_q))).squeeze(2)
    return pad(by_key, (0, -n % block_k)).unflatten(-1, (-1, block_k)).sum(-1), top.squeeze(-1) + total.log()


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
