"""How evenly a layer's attention is spread over positions: the variance of the column sums of its heads (d2o, 2406.13035).

    f = mean over query heads of minmax(Var_j s_h[j]),    s_h[j] = sum_i softmax_j(q_i.k_j / sqrt(D))

minmax maps the smallest variance among the heads to 0 and the largest to 1; where all are alike f is 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import LayerContext, StoredKV
from saccade.parts.mass_sums import mass_sums
from saccade.parts.probabilities import probabilities
from saccade.parts.recent_queries import recall

COLUMNS = "column sums"  # in the state: s of each query head, of the queries that no longer wait


def sums_by_head(state: dict[str, Any], q: Tensor, k: Tensor, **options: Any) -> Tensor:
    """`mass_sums` of q, k with its options, for `accumulate`; what each query head adds, `(B, Hq, n)`, is summed up in the state
    besides."""
    group = q.shape[1] // k.shape[1]
    # one member of every group at a time: keys are never repeated
    sums = torch.stack([mass_sums(q[:, member::group], k, **options) for member in range(group)], dim=2)
    each, known = sums.flatten(1, 2), state.get(COLUMNS)
    state[COLUMNS] = each if known is None else each + F.pad(known, (0, each.shape[2] - known.shape[2]))
    return sums.sum(2)


def column_spread(ctx: LayerContext, kv: StoredKV) -> Tensor:
    """f if 0, 1, 2, ... of the newest tokens are taken back, float64 `(B, W + 1)`, W being the queries that `accumulate` lets wait."""
    steps, waiting, n = ctx.state[COLUMNS].double().unsqueeze(2), recall(ctx.state, ctx.seen), kv.length
    if waiting is not None:
        weights = probabilities(waiting, kv.keys, scale=ctx.scale, softcap=ctx.softcap, valid=kv.valid).flatten(1, 2)
        steps = torch.cat([steps, steps + weights.double().cumsum(2)], dim=2).flip(2)
    sizes = torch.arange(n, n - steps.shape[2], -1, device=steps.device).clamp(min=1)
    variance = steps.square().sum(-1) / sizes - (steps.sum(-1) / sizes).square()
    low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
    return torch.where(high > low, (variance - low) / (high - low), 0.0).mean(1)
