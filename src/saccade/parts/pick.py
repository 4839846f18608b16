"""A fixed number of best units per head, as ascending ids and as the Selection of one query."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.ops.estimate import best_ids


def pick_best(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row of `(..., n)`, ascending, int64 `(..., count)`.

    Ties go to the lower position. A nan counts as the highest score: what it stands for is read, not lost.
    """
    return best_ids(scores, count)


def read_tokens(ids: Tensor, n: int) -> Selection:
    """One query reads the keys `ids (B, H, m)`, ascending, out of n."""
    return _listed(ids[..., :0], ids, 1, n)


def read_pages(ids: Tensor, page_size: int, n: int) -> Selection:
    """One query reads the pages `ids (B, H, m)`, ascending, of `page_size` keys each, out of n keys."""
    return _listed(ids * page_size, ids[..., :0], page_size, n)


def _listed(starts: Tensor, tokens: Tensor, block_k: int, n: int) -> Selection:
    starts, tokens = (x.to(torch.int32).unsqueeze(2) for x in (starts, tokens))
    counts = [_counts(x.shape[:3], x.shape[3], x.device) for x in (starts, tokens)]
    return Selection(
        n_q=1, n_k=n, block_q=1, block_k=block_k, starts=starts, start_counts=counts[0], tokens=tokens,
        token_counts=counts[1],
    )  # fmt: skip


def _counts(shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """int32 of a shape and one number; made once, for steps read as much again and again."""
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured or torch.compiler.is_compiling():  # what a graph makes is the graph's
        return torch.full(shape, count, dtype=torch.int32, device=device)
    return _kept_counts(tuple(shape), count, device)


@lru_cache(maxsize=256)
def _kept_counts(shape: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full(shape, count, dtype=torch.int32, device=device)
