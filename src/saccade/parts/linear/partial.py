"""Softmax in pieces, and the ways hybrids join it with something cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PartialSoftmax(NamedTuple):
    """Attention over some keys, to be completed by others: top `(B, H, N, 1)` the largest logit, total `(B, H, N, 1)` the sum of
    `exp(logit - top)`, value `(B, H, N, Dv)` the values weighted by that. A row without keys has top -inf, total 0 and value 0."""

    top: Tensor
    total: Tensor
    value: Tensor

    @property
    def out(self) -> Tensor:
        """Attention over these keys alone; 0 in a row without keys."""
        return self.value / self.total.masked_fill(self.total == 0, 1.0)


def partial_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None) -> PartialSoftmax:
    """q `(B, H, N, D)` over k `(B, H, M, D)`, v `(B, H, M, Dv)` where mask (bool, broadcastable to `(B, H, N, M)`) is True.

    H counts query heads; k and v may have fewer that divide them. scale: default `D ** -0.5`. Computed in float32 at least.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    kv_heads, n = k.shape[1], q.shape[2]
    k, v = k.to(wide), v.to(wide)
    # the queries of a group become rows over their key/value head: nothing is repeated
    rows = (q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)).unflatten(1, (kv_heads, -1)).flatten(2, 3)
    logits = (rows @ k.mT).unflatten(2, (-1, n)).flatten(1, 2)
    logits = logits.masked_fill(~mask, float("-inf"))
    top = logits.amax(-1, keepdim=True).detach()
    weights = (logits - top.masked_fill(top == float("-inf"), 0.0)).exp()
    value = (weights.unflatten(1, (kv_heads, -1)).flatten(2, 3) @ v).unflatten(2, (-1, n)).flatten(1, 2)
    return PartialSoftmax(top, weights.sum(-1, keepdim=True), value)


def shared_denominator(
    exact: PartialSoftmax, value: Tensor, total: Tensor, *, exact_factor: Tensor | float = 1.0, value_factor: Tensor | float = 1.0,
    eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """`(a sum_j e^(l_j - m) v_j + g phi_q S) / (a sum_j e^(l_j - m) + phi_q.z + eps)`: both in one row (lolcats, still).

    value `(B, H, N, Dv)` = phi_q S and total `(B, H, N, 1)` = phi_q.z of the linear part, sums and not divided. exact_factor a weights the
    exact part in both places, value_factor g the linear part in the numerator alone.
    """
    numerator = exact_factor * exact.value + value_factor * value
    return numerator / (exact_factor * exact.total + total + eps)


def gated_sum(outs: Sequence[Tensor], weights: Sequence[Tensor | float]) -> Tensor:
    """`sum_i w_i out_i`."""
    if len(outs) != len(weights) or not outs:
        raise ValueError(f"{len(outs)} outputs and {len(weights)} weights: give one weight for each output")
    total = outs[0] * weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total = total + out * weight
    return total


def mean_of_norms(outs: Sequence[Tensor], weights: Sequence[Tensor], eps: float = 1e-6) -> Tensor:
    """The mean of RMS norms over the last axis, each with its own weights (hymba)."""
    normed = [torch.nn.functional.rms_norm(out, out.shape[-1:], weight, eps) for out, weight in zip(outs, weights, strict=True)]
    return torch.stack(normed).mean(0)
