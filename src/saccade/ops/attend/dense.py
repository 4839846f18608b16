"""Dense attention: torch's fused kernels where they can, query tiles in plain torch where they can't."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial, merge
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.tile import attend_tile

ROWS = 256  # query rows per tile where no fused kernel applies


def attend(problem: Problem) -> tuple[str, Partial]:
    """The name of what ran and its result."""
    q, k, v = problem.q, problem.k, problem.v
    n_q, n_k = q.shape[2], k.shape[2]
    if n_q == 0 or n_k == 0:
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        return "dense", Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), lse if problem.return_lse else None)
    if problem.plain and not problem.return_lse and (not problem.causal or n_q in (1, n_k)):
        return "sdpa", Partial(_sdpa(problem, causal=problem.causal and n_q > 1), None)
    if problem.plain and problem.causal and 1 < n_q < n_k and not problem.return_lse:
        # new rows over old keys: what is older is wholly visible, what is new is a causal square
        past, new = n_k - n_q, slice(n_k - n_q, None)
        old = _with_lse(q, k[:, :, :past], v[:, :, :past], problem, causal=False)
        own = _with_lse(q, k[:, :, new], v[:, :, new], problem, causal=True)
        if old is not None and own is not None:
            return "sdpa+lse", Partial(merge(old, own).out, None)
    if problem.plain and (not problem.causal or n_q in (1, n_k)):
        fused = _with_lse(q, k, v, problem, causal=problem.causal and n_q > 1)
        if fused is not None:
            return "sdpa+lse", fused
    return "tiled", _tiled(problem)


def _sdpa(problem: Problem, *, causal: bool) -> Tensor:
    q, k, v, layout = problem.q, problem.k, problem.v, problem.layout
    if q.shape[2] == 1 and layout.group > 1:
        # the queries of a group become rows over their key/value head: nothing is repeated
        packed = layout.to_groups(q.squeeze(2))
        return F.scaled_dot_product_attention(packed, k, v, scale=problem.scale).flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=problem.scale, enable_gqa=layout.group > 1)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, causal: bool) -> Partial | None:
    """Fused attention that also gives the log-sum-exp; None where torch has no such kernel for the input."""
    if k.shape[2] == 0 or q.requires_grad or k.requires_grad or v.requires_grad or q.shape[-1] != v.shape[-1]:
        return None
    layout, n_q = problem.layout, q.shape[2]
    if q.device.type == "cpu":
        if not causal and layout.group > 1:
            out, lse = _cpu_flash(layout.to_groups(q).flatten(2, 3), k, v, problem.scale, causal=False)
            return Partial(
                out.unflatten(2, (layout.group, n_q)).flatten(1, 2), lse.unflatten(2, (layout.group, n_q)).flatten(1, 2)
            )
        k, v = (x.repeat_interleave(layout.group, dim=1) if layout.group > 1 else x for x in (k, v))
        return Partial(*_cpu_flash(q, k, v, problem.scale, causal=causal))
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
        k, v = (x.repeat_interleave(layout.group, dim=1) if layout.group > 1 else x for x in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=problem.scale)
        return Partial(out, lse[:, :, :n_q])
    return None


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    # the kernel lays the log-sum-exp out as (B, N, H) in memory and returns a transposed view
    return out, lse if lse.shape == q.shape[:3] else lse.transpose(1, 2)


def _tiled(problem: Problem) -> Partial:
    """Tiles of query rows over all keys they can see, in plain torch: softcap, bias, any dtype, differentiable."""
    q, layout = problem.q, problem.layout
    n_q, n_k = q.shape[2], problem.k.shape[2]
    k, v = problem.k.unsqueeze(2), problem.v.unsqueeze(2)
    keys = torch.arange(n_k, device=q.device)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for begin in range(0, n_q, ROWS):
        end = min(begin + ROWS, n_q)
        last = n_k - n_q + end if problem.causal else n_k
        last = max(last, 1)
        rows = torch.arange(begin, end, device=q.device) + n_k - n_q
        mask = None
        if problem.causal:
            mask = torch.zeros(end - begin, last, device=q.device).masked_fill(keys[:last] > rows[:, None], -torch.inf)
        bias = problem.bias
        if bias is not None:
            bias = bias[:, :, begin:end] if bias.shape[2] > 1 else bias
            bias = bias[..., :last] if bias.shape[3] > 1 else bias
            bias = layout.to_groups(bias) if bias.shape[1] > 1 else bias.unsqueeze(2)
        part = attend_tile(
            layout.to_groups(q[:, :, begin:end]), k[..., :last, :], v[..., :last, :], mask, scale=problem.scale,
            softcap=problem.softcap, bias=bias, return_lse=True,
        )  # fmt: skip
        assert part.lse is not None
        outs.append(part.out.flatten(1, 2))
        lses.append(part.lse.flatten(1, 2))
    return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2) if problem.return_lse else None)
