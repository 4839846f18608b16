"""Chunks of unequal length: where they begin, what stands for each, and tokens taken from the best of them."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core.tilemath import list_true
from saccade.parts.choose import ranks


def separated_peaks(scores: Tensor, apart: int, count: int, forced: Tensor) -> Tensor:
    """Greedy 1-D non-maximum suppression: bool `(B, n)` of the `count` best positions no two of which are within `apart`.

    scores `(B, n)`, -inf: never taken; forced: positions that are taken first, whatever their score and distance, and not counted. Of
    equal scores the lower position wins.
    """
    n = scores.shape[-1]
    places = torch.arange(n, device=scores.device)
    near = ((places.unsqueeze(-1) - forced).abs() <= apart).any(-1)
    alive = (scores > -torch.inf) & ~near
    order = ranks(scores).to(torch.float32 if n < 1 << 24 else torch.float64)
    taken = torch.zeros_like(alive)
    # a candidate that is the best within reach would be taken by the greedy walk as well: all such ones at once, until none is left
    while bool(alive.any()):
        height = torch.where(alive, n - order, 0.0)
        best = torch.nn.functional.max_pool1d(height.unsqueeze(1), 2 * apart + 1, stride=1, padding=apart).squeeze(1)
        peaks = alive & (height == best)
        reach = torch.nn.functional.max_pool1d(peaks.to(order.dtype).unsqueeze(1), 2 * apart + 1, stride=1, padding=apart).squeeze(1)
        taken |= peaks
        alive = alive & (reach == 0)
    taken &= ranks(scores.masked_fill(~taken, -torch.inf)) < count
    return taken.index_fill(-1, forced, True)


def chunk_starts(begins: Tensor) -> Tensor:
    """First positions of the chunks `(B, M)` int64 from bool `(B, n)`; position 0 begins one always; past a row's last chunk n."""
    begins = begins.clone()
    begins[:, 0] = True
    return list_true(begins)[0].long()


def chunk_ends(starts: Tensor, n: int) -> Tensor:
    """One past the last position of each chunk."""
    return torch.nn.functional.pad(starts[:, 1:], (0, 1), value=n)


def scaled_means(x: Tensor, starts: Tensor) -> Tensor:
    """`sqrt(length) * mean` of each chunk of x `(B, n, D)`: `(B, M, D)` float32 (float64 for float64), 0 for absent chunks.

    The mean of many unrelated keys is short; with the root its length says nothing about the chunk's.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    before = torch.nn.functional.pad(x.to(torch.float64).cumsum(1), (0, 0, 1, 0))
    ends = chunk_ends(starts, x.shape[1])
    first, past = (torch.gather(before, 1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for at in (starts, ends))
    lengths = (ends - starts).clamp(min=1).unsqueeze(-1)
    return ((past - first) / lengths.sqrt()).to(exact)


def best_chunks(scores: Tensor, starts: Tensor, low: int, high: Tensor, room: Tensor, n: int) -> Tensor:
    """Tokens of the best chunks: int32 `(B, T, m)` ascending, past the end of a list n.

    scores `(B, T, M)`: of each chunk for each query tile. Tile t takes `room[t]` of the positions `low ... high[t] - 1`, chunk by chunk
    from the highest score on (ties: the earlier chunk); of the chunk in which the room ends, the first positions.
    """
    first = starts.clamp(min=low).unsqueeze(1)
    past = torch.minimum(chunk_ends(starts, n).unsqueeze(1), high.unsqueeze(-1))
    offered = (past - first).clamp(min=0)
    order = torch.sort(scores.masked_fill(offered == 0, -torch.inf), dim=-1, descending=True, stable=True).indices
    sizes = torch.gather(offered, -1, order)
    left = room.unsqueeze(-1) - (sizes.cumsum(-1) - sizes)
    taken = torch.empty_like(sizes).scatter_(-1, order, left.clamp(min=0).minimum(sizes))
    through = taken.cumsum(-1)
    total = through[..., -1:]
    slots = torch.arange(int(total.max()) if total.numel() else 0, device=scores.device)
    slots = slots.expand(*total.shape[:-1], -1).contiguous()
    # the run of positions that a slot falls into, and how far into it
    run = torch.searchsorted(through, slots, right=True).clamp(max=through.shape[-1] - 1)
    ids = torch.gather(first.expand(taken.shape) - (through - taken), -1, run) + slots
    return torch.where(slots < total, ids, n).to(torch.int32)
