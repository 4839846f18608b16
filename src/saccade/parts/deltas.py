"""Delta-coded keys: of each channel only the changes that exceed a threshold are kept, and scores are summed up from them.

    x = k_j[c] - r[c];   |x| > theta:  Delta_j[c] = x, r[c] = k_j[c];   else  Delta_j[c] = 0

r starts at 0 and is the last value that was sent, not the last key: so every channel of `khat_j = sum_{t <= j} Delta_t` is within
theta of k_j. Every `restart` keys one is sent in full, so that runs of keys are independent and rounding does not pile up.
"""

from __future__ import annotations

import torch
from torch import Tensor


def delta_code(keys: Tensor, theta: float, restart: int) -> Tensor:
    """Deltas of keys `(..., n, D)`: `(..., n, D)`, float32 (float64 for float64). The first key of each run of `restart` is whole.

    One loop over the places of a run, all runs at once. The deltas of a prefix are the prefix of the deltas.
    """
    exact = torch.float64 if keys.dtype == torch.float64 else torch.float32
    n = keys.shape[-2]
    runs = torch.nn.functional.pad(keys.to(exact), (0, 0, 0, -n % restart)).unflatten(-2, (-1, restart))
    deltas = torch.zeros_like(runs)
    deltas[..., 0, :] = sent = runs[..., 0, :]
    for place in range(1, min(restart, n)):
        here = runs[..., place, :]
        change = here - sent
        moved = change.abs() > theta
        deltas[..., place, :] = torch.where(moved, change, 0.0)
        sent = torch.where(moved, here, sent)
    return deltas.flatten(-3, -2)[..., :n, :]


def rebuilt(deltas: Tensor, restart: int) -> Tensor:
    """khat, the keys that the deltas `(..., n, D)` stand for."""
    n = deltas.shape[-2]
    runs = torch.nn.functional.pad(deltas, (0, 0, 0, -n % restart)).unflatten(-2, (-1, restart))
    return runs.cumsum(-2).flatten(-3, -2)[..., :n, :]


def delta_scores(q: Tensor, deltas: Tensor, restart: int) -> Tensor:
    """q.khat of every query and key, from the deltas alone: `s_j = s_{j-1} + q.Delta_j`, anew at each restart.

    q `(..., m, D)` and deltas `(..., n, D)` in one dtype to `(..., m, n)`. A channel with Delta_j[c] = 0 adds nothing to s_j: the
    multiplications that count are the non-zero entries.
    """
    n = deltas.shape[-2]
    steps = q @ deltas.mT
    whole = n - n % restart
    scores = torch.empty_like(steps)
    torch.cumsum(steps[..., :whole].unflatten(-1, (-1, restart)), -1, out=scores[..., :whole].unflatten(-1, (-1, restart)))
    scores[..., whole:] = steps[..., whole:].cumsum(-1)
    return scores
