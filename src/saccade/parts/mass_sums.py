"""How much attention each stored entry has received: column sums of the attention map, without the map."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.probabilities import probabilities

PAIRS = 1 << 22  # score pairs (of all heads) that are held at a time


def mass_sums(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, valid: Tensor | None = None, behind: int = 0
) -> Tensor:
    """Sum of softmax weights over the queries and over each query group: `(B, Hk, n)`, float32 (float64 for float64
    keys).

    Arguments as in `probabilities`. Works through the queries in runs of rows, so memory grows with n and not with m *
    n.
    """
    m, n = q.shape[2], k.shape[2]
    total = torch.zeros(*k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
    rows = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * n))
    for begin in range(0, m, rows):
        end = min(begin + rows, m)
        later = behind + m - end
        # what is newer than these rows is not theirs to see; heads of unequal length end elsewhere
        seen = n if valid is not None else n - later
        behind_rows = 0 if valid is None else later
        part = probabilities(
            q[:, :, begin:end], k[:, :, :seen], scale=scale, softcap=softcap, valid=valid, behind=behind_rows
        )
        total[:, :, :seen] += part.sum(dim=(2, 3))
    return total
