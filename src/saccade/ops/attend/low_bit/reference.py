"""The oracle: rounded numbers, then the running softmax over blocks of keys in float64, with a dense mask. Any device."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.low_bit import codes
from saccade.ops.attend.low_bit.problem import LowBit
from saccade.ops.attend.problem import Problem

LOG2E = 1.4426950408889634


def attend(case: LowBit) -> Partial:
    p, layout = case.problem, case.problem.layout
    q, k, v, row = (None if x is None else x.double() for x in codes.of(case))
    assert q is not None and k is not None and v is not None
    batch, heads, n_q, n_k = *p.q.shape[:3], p.k.shape[2]
    mask, weight = _mask(p), _log_weight(p)
    rows, _ = case.query_tiles()
    tile = torch.zeros(n_q + 1, dtype=torch.long, device=p.q.device)
    tile[rows.flatten()] = torch.arange(rows.shape[0], device=p.q.device).repeat_interleave(rows.shape[1])
    tile = tile[:n_q]
    top = q.new_full((batch, heads, n_q), -torch.inf)
    total, out = torch.zeros_like(top), q.new_zeros(batch, heads, n_q, v.shape[-1])
    for begin in range(0, n_k, case.block_k):
        part = slice(begin, begin + case.block_k)
        products = (layout.to_groups(q) @ k[:, :, None, part].mT).flatten(1, 2)
        logits = p.logits(products if row is None else products + row.unsqueeze(-1))
        logits = logits if weight is None else logits + weight[..., part]
        logits = logits if mask is None else logits.masked_fill(~mask[..., part], -torch.inf)
        peak = logits.amax(-1)
        read = torch.ones_like(top, dtype=torch.bool)
        if case.skip_below is not None:
            gain = torch.where(peak > -torch.inf, (peak - top) * LOG2E, -torch.inf)
            most = gain.new_full((batch, heads, rows.shape[0]), -torch.inf)
            most = most.scatter_reduce(-1, tile.expand_as(gain), gain, "amax")
            read = (most >= -case.skip_below)[..., tile]
        top_now = torch.maximum(top, peak)
        shift = top_now.masked_fill(top_now == -torch.inf, 0.0)  # a row without any key so far
        weights = torch.where(read.unsqueeze(-1), (logits - shift.unsqueeze(-1)).exp(), 0.0)
        forget = (top - shift).exp()
        total = total * forget + weights.sum(-1)
        if case.pv == "fp8":
            weights = codes.to_float8(weights * codes.WEIGHT_SCALE) / codes.WEIGHT_SCALE
        value = (layout.to_groups(weights) @ v[:, :, None, part]).flatten(1, 2)
        out = out * forget.unsqueeze(-1) + value
        top = top_now
    none = total == 0
    out = out / total.masked_fill(none, 1.0).unsqueeze(-1)
    lse = torch.where(none, -torch.inf, top + total.masked_fill(none, 1.0).log())
    lse = lse if p.q.dtype == torch.float64 else lse.float()
    return Partial(out.to(p.q.dtype), lse if p.return_lse else None)


def _mask(p: Problem) -> Tensor | None:
    """Which keys each query reads, bool, broadcastable to `(B, Hq, Nq, Nk)`; None for all."""
    if p.selection is not None:
        return p.selection.expand(p.q.shape[0], p.q.shape[1]).dense_mask()
    if not p.causal:
        return None
    n_q, n_k = p.q.shape[2], p.k.shape[2]
    return torch.ones(n_q, n_k, dtype=torch.bool, device=p.q.device).tril(n_k - n_q)


def _log_weight(p: Problem) -> Tensor | None:
    """What the selection adds to each logit, `(B, Hq, Nq, Nk)`."""
    if p.selection is None or p.selection.log_weight is None:
        return None
    s = p.selection.own_lists().expand(p.q.shape[0], p.q.shape[1])
    assert s.log_weight is not None
    spread = torch.zeros(*s.tokens.shape[:-1], s.n_k + 1, dtype=torch.float64, device=s.device)
    spread = spread.scatter(-1, s.tokens.long(), s.log_weight.double())[..., : s.n_k]
    return spread.repeat_interleave(s.block_q, dim=2)[:, :, : s.n_q]
