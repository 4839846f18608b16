"""How much attention each entry gets from the text among a sequence's tokens.

    s_j = sum over text queries i of softmax_j(q_i.k_j / sqrt(D)),      summed over the query heads of a group

Source: sparse-to-dense, arXiv 2505.19155 (its mean over the text differs by a factor only).
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.parts.mass_sums import PAIRS
from saccade.parts.probabilities import probabilities


def text_mass(q: Tensor, k: Tensor, text: Tensor, *, scale: float, softcap: float | None = None, behind: int = 0) -> Tensor:
    """s of all n entries, `(B, Hk, n)` float32 (float64 for float64 keys).

    q `(B, Hq, m, D)` belongs to the newest m tokens but the last `behind`, k `(B, Hk, n, D)` holds all entries; text `(B, m)` bool says
    which of the queries are text. Memory grows with n, not with m * n.
    """
    m, n = q.shape[2], k.shape[2]
    total = torch.zeros(*k.shape[:3], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
    rows = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * n))
    for begin in range(0, m, rows):
        end = min(begin + rows, m)
        if not bool(text[:, begin:end].any()):
            continue
        seen = n - (behind + m - end)  # what is newer is not theirs to see
        part = probabilities(q[:, :, begin:end], k[:, :, :seen], scale=scale, softcap=softcap)
        total[:, :, :seen] += (part * text[:, None, None, begin:end, None]).sum((2, 3))
    return total
