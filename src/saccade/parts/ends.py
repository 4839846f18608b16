"""The two ends of a cache, which most methods read whatever the scores say: the first keys and the newest ones."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Selection


def force_ends(scores: Tensor, count: int, *, sinks: int, recent: int) -> Tensor:
    """`scores (..., n)`, changed in place, so that the `count` best hold the first `sinks` and the last `recent` positions.

    Where the count is too small for both, sinks go first and then the newest, as in `keep.best_slots`.
    """
    n = scores.shape[-1]
    count = min(count, n)
    sinks = min(sinks, count)
    recent = min(recent, count - sinks)
    scores[..., :sinks].fill_(torch.inf)
    scores[..., n - recent :].fill_(torch.inf)
    return scores


def read_with_tail(ids: Tensor, begin: int, n: int, log_weight: Tensor | None = None) -> Selection:
    """One query reads the keys `ids (B, H, m)` int32, ascending, below `begin`, past the end n, and all keys from `begin` to n.

    log_weight: float32, like ids: added to the logits of those keys. The tail is one tile, and one softmax runs over both parts: the
    same as merging them. Raises ValueError when there is no tail.
    """
    if not 0 <= begin < n:
        raise ValueError(f"a tail from {begin} on in {n} keys: expected a place from 0 to {n - 1}")
    tokens = ids.unsqueeze(2)
    counts = (tokens < n).sum(-1, dtype=torch.int32)
    starts = torch.full((*tokens.shape[:3], 1), begin, dtype=torch.int32, device=ids.device)
    return Selection(
        n_q=1, n_k=n, block_q=1, block_k=n - begin, starts=starts, start_counts=torch.ones_like(counts), tokens=tokens,
        token_counts=counts, log_weight=None if log_weight is None else log_weight.unsqueeze(2).float(),
        aligned=begin % (n - begin) == 0,
    )  # fmt: skip
