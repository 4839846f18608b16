"""A fixed number of best units per head, as ascending ids and as the Selection of one query."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Selection


def pick_best(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row of `(..., n)`, ascending, int64 `(..., count)`.

    Ties go to the lower position. A nan counts as the highest score: what it stands for is read, not lost.
    """
    n = scores.shape[-1]
    if count >= n:
        return torch.arange(n, device=scores.device).expand(*scores.shape[:-1], n)
    last = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    found = (scores >= last).nonzero()[:, -1]
    if found.numel() != last.numel() * count:
        # ties at the border, or a nan: only a stable sort puts the lower position first
        found = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count].sort(-1).values
    return found.view(*scores.shape[:-1], count)


def read_tokens(ids: Tensor, n: int) -> Selection:
    """One query reads the keys `ids (B, H, m)`, ascending, out of n."""
    return _listed(ids[..., :0], ids, 1, n)


def read_pages(ids: Tensor, page_size: int, n: int) -> Selection:
    """One query reads the pages `ids (B, H, m)`, ascending, of `page_size` keys each, out of n keys."""
    return _listed(ids * page_size, ids[..., :0], page_size, n)


def _listed(starts: Tensor, tokens: Tensor, block_k: int, n: int) -> Selection:
    starts, tokens = (x.to(torch.int32).unsqueeze(2) for x in (starts, tokens))
    counts = [torch.full(x.shape[:3], x.shape[3], dtype=torch.int32, device=x.device) for x in (starts, tokens)]
    return Selection(
        n_q=1, n_k=n, block_q=1, block_k=block_k, starts=starts, start_counts=counts[0], tokens=tokens,
        token_counts=counts[1],
    )  # fmt: skip
