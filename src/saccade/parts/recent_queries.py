"""The newest queries of a sequence, kept from call to call, also when tokens are taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GUESSES = 16  # tokens that prompt lookup may take back after a call: so many more queries are kept


def remember(state: dict[str, Any], q: Tensor, seen: int, keep: int) -> None:
    """Add the queries `(B, Hq, m, D)` of the newest m of `seen` tokens; the newest `keep` stay, as
    `state["queries"]`."""
    older = None if q.shape[2] >= keep else recall(state, seen - q.shape[2])
    both = q if older is None else torch.cat([older, q], dim=2)
    # a copy: a view would hold the queries of the whole prompt in memory
    state["queries"] = both[:, :, max(0, both.shape[2] - keep) :].clone()
    state["queries_seen"] = seen


def recall(state: dict[str, Any], seen: int) -> Tensor | None:
    """The kept queries `(B, Hq, m, D)` of the newest of `seen` tokens, those that were taken back left out; None when
    there are none."""
    queries: Tensor | None = state.get("queries")
    if queries is None:
        return None
    stay = queries.shape[2] - (state["queries_seen"] - seen)
    return queries[:, :, :stay] if 0 < stay <= queries.shape[2] else None
