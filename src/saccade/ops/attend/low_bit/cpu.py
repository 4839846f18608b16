"""Plain torch on rounded numbers: by query tiles where nothing is skipped, by key blocks where tiles may be."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saccade.core import HeadLayout, Partial
from saccade.ops.attend import cpu as gathering
from saccade.ops.attend import dense
from saccade.ops.attend.low_bit import codes
from saccade.ops.attend.low_bit.problem import LowBit

CHUNK = 1 << 22  # logits held at a time
LOG2E = 1.4426950408889634


def attend(case: LowBit) -> Partial:
    p = case.problem
    if p.q.numel() == 0 or p.k.shape[2] == 0:
        return dense.attend(replace(p, selection=None))[1]
    numbers = codes.of(case)
    q, k = numbers.q, numbers.k
    if numbers.row is not None and (p.return_lse or p.softcap is not None):
        # one more channel carries q.kbar, which is not rounded
        q = torch.cat([q, numbers.row.unsqueeze(-1)], dim=-1)
        k = torch.cat([k, k.new_ones(*k.shape[:3], 1)], dim=-1)
    layout = HeadLayout.of(q, k, numbers.v)
    problem = replace(p, q=q, k=k, v=numbers.v, layout=layout)
    if case.in_steps and (case.skip_below is not None or case.pv == "fp8"):
        result = _by_key_block(replace(case, problem=problem))
    elif p.selection is None:
        result = dense.attend(problem)[1]
    else:
        result = gathering.attend(problem)
    return Partial(result.out.to(p.q.dtype), result.lse if p.return_lse else None)


def _by_key_block(case: LowBit) -> Partial:
    """The running softmax of all query tiles, key block after key block; a tile takes part in the blocks it reads."""
    p, rows, tile = case.problem, *case.query_tiles()
    batch, heads, n_q, n_k = *p.q.shape[:3], p.k.shape[2]
    pieces = rows.shape[0]
    q = p.q[:, :, rows.clamp(max=n_q - 1)].flatten(0, 2)  # (B*Hq*T, rows, D)
    kv = torch.arange(batch * heads, device=q.device) // heads * p.layout.kv_heads
    kv = (kv + torch.arange(heads, device=q.device).repeat(batch) // p.layout.group).repeat_interleave(pieces)
    k, v = p.k.flatten(0, 1), p.v.flatten(0, 1)
    position = (rows + n_k - n_q).masked_fill(rows == n_q, -1) if p.causal else (rows < n_q) * n_k - 1
    position = position.repeat(batch * heads, 1)
    top = q.new_full(q.shape[:2], -torch.inf)
    total, out = torch.zeros_like(top), q.new_zeros(*q.shape[:2], v.shape[-1])
    step = max(1, CHUNK // (case.rows * case.block_k))
    for begin in range(0, n_k, case.block_k):
        keys = torch.arange(begin, min(begin + case.block_k, n_k), device=q.device)
        for ids in (_listed(case, begin, tile) & (position.amax(-1) >= begin)).nonzero().squeeze(-1).split(step):
            logits = p.logits(q[ids] @ k[kv[ids], begin : begin + case.block_k].mT)
            logits = logits.masked_fill(keys > position[ids].unsqueeze(-1), -torch.inf)
            peak, before = logits.amax(-1), top[ids]
            gain = torch.where(peak > -torch.inf, (peak - before) * LOG2E, -torch.inf)
            skipped = torch.zeros(len(ids), dtype=torch.bool, device=q.device)
            if case.skip_below is not None:
                skipped = gain.amax(-1) < -case.skip_below
            now = torch.maximum(before, peak)
            shift = now.masked_fill(now == -torch.inf, 0.0)
            weights = (logits - shift.unsqueeze(-1)).exp().masked_fill(skipped[:, None, None], 0.0)
            forget = (before - shift).exp()
            total[ids] = total[ids] * forget + weights.sum(-1)
            if case.pv == "fp8":
                weights = codes.to_float8(weights * codes.WEIGHT_SCALE) / codes.WEIGHT_SCALE
            out[ids] = out[ids] * forget.unsqueeze(-1) + weights @ v[kv[ids], begin : begin + case.block_k]
            top[ids] = now
    none = total == 0
    out = out / total.masked_fill(none, 1.0).unsqueeze(-1)
    lse = torch.where(none, -torch.inf, top + total.masked_fill(none, 1.0).log())
    place = (rows < n_q).flatten().nonzero().squeeze(-1)  # tiles are in order of their rows
    out = out.view(batch, heads, -1, v.shape[-1])[:, :, place]
    return Partial(out, lse.view(batch, heads, -1)[:, :, place])


def _listed(case: LowBit, begin: int, tile: Tensor) -> Tensor:
    """Whether each query tile reads the block of keys that starts at `begin`, bool `(B * Hq * T)`; causality apart."""
    p, s = case.problem, case.problem.selection
    if s is None:
        return torch.ones(p.q.shape[0] * p.q.shape[1] * len(tile), dtype=torch.bool, device=p.q.device)
    reads = ((s.starts <= begin) & (s.starts > begin - s.block_k)).any(-1)
    reads = reads.repeat_interleave(p.q.shape[1] // reads.shape[1], dim=1).expand(p.q.shape[0], -1, -1)
    return reads[:, :, tile].flatten()
