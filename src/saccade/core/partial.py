"""Partial results of softmax attention, and their exact combination."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Softmax attention over some of the keys.

    out: `(B, Hq, Nq, Dv)`, normalised over the keys that were read; a row that read no key is 0.
    lse: `(B, Hq, Nq)` float32 (float64 for float64 inputs), natural log of the sum of exponentials of those keys' logits,
        -inf for a row that read no key; None where the caller did not ask for it.
    """

    out: Tensor
    lse: Tensor | None


def merge(*partials: Partial) -> Partial:
    """Combine attention over disjoint key sets into attention over their union; exact up to rounding.

    `out = sum_i w_i out_i` with `w_i = exp(lse_i - logsumexp(lse))`. A row that read no key anywhere stays 0 with lse -inf.

    Raises ValueError when a partial has no log-sum-exp (ask for it with `return_lse=True`) or the shapes differ.
    """
    if not partials:
        raise ValueError("merge was given no partial results: give at least one")
    if any(p.lse is None for p in partials):
        raise ValueError("merge needs the log-sum-exp of every partial: compute each with return_lse=True")
    shapes = {tuple(p.out.shape) for p in partials}
    if len(shapes) > 1:
        raise ValueError(f"merge was given outputs of shapes {sorted(shapes)}: they must be the same rows and heads")
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([p.lse for p in partials if p.lse is not None])
    lse = torch.logsumexp(lses, dim=0)
    # a row without any key would give -inf - -inf = nan: its weights are 0 by policy
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    out = torch.zeros_like(partials[0].out, dtype=weights.dtype)
    for weight, partial in zip(weights, partials, strict=True):
        out = out + weight.unsqueeze(-1) * partial.out
    return Partial(out.to(partials[0].out.dtype), lse)
