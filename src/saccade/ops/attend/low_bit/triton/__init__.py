"""Triton kernels for `attend_low_bit` as a torch operator, opaque to torch.compile; nothing in it waits for the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Partial
from saccade.ops.attend.low_bit.problem import LowBit
from saccade.ops.attend.low_bit.triton.launch import forward
from saccade.ops.attend.triton.launch import Lists, lists_of

__all__ = ["attend", "refuses"]


def refuses(case: LowBit) -> str | None:
    """Why the kernels can't run this call, or None."""
    q, v = case.problem.q, case.problem.v
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"the dtype is {q.dtype}: float16, bfloat16 and float32 are supported"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"the head dims are {q.shape[-1]} and {v.shape[-1]}: 256 is the most"
    if "fp8" in (case.qk, case.pv) and q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "float8 needs a GPU of compute capability 8.9 or higher"
    return None


def attend(case: LowBit) -> Partial:
    """Attention of a call that `refuses` did not refuse."""
    p = case.problem
    lists = None if p.selection is None else lists_of(p.selection)
    parts = (None,) * 5 + (1, 1, True) if lists is None else tuple(lists)
    out, lse = _attend(
        p.q, p.k, p.v, *parts, p.causal, case.qk, case.pv, case.smooth, p.scale, p.softcap or 0.0, case.block_q, case.block_k,
        case.skip_below, p.return_lse,
    )  # fmt: skip
    return Partial(out, lse if p.return_lse else None)


@torch.library.custom_op("saccade::attend_low_bit", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, tile_q: int, tile_k: int, aligned: bool, causal: bool, qk: str, pv: str,
    smooth: bool, scale: float, softcap: float, block_q: int, block_k: int, skip_below: float | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lists = None
    if starts is not None and start_counts is not None and tokens is not None and token_counts is not None:
        lists = Lists(starts, start_counts, tokens, token_counts, log_weight, tile_q, tile_k, aligned)
    return forward(
        q, k, v, lists, causal=causal, qk=qk, pv=pv, smooth=smooth, scale=scale, softcap=softcap, block_q=block_q, block_k=block_k,
        skip_below=skip_below, need_lse=need_lse,
    )  # fmt: skip


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, start_counts: Tensor | None, tokens: Tensor | None,
    token_counts: Tensor | None, log_weight: Tensor | None, tile_q: int, tile_k: int, aligned: bool, causal: bool, qk: str, pv: str,
    smooth: bool, scale: float, softcap: float, block_q: int, block_k: int, skip_below: float | None, need_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3] if need_lse else (0,), dtype=torch.float32)
