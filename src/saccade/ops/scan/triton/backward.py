"""Gradients of the forms without delta rule and without gates per channel: three more walks, see `outputs`."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.scan.triton.config import Config, config, padded
from saccade.ops.scan.triton.launch import Dots, Shared, Walk, walk


def backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, gate_grad: bool, c: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """(dq, dk, dv, dlog_decay or None, dstate at the start), from dout `(B, H, N, Dv)` and dstate `(S, H, D, Dv)` at the end."""
    heads, n = dout.shape[1], q.shape[2]
    dout = dout.to(q.dtype)
    c = c or config(max(q.shape[-1], v.shape[-1]), max(q.shape[-1], v.shape[-1]), q.dtype, delta=False, channel=False)
    turned_start = None if state is None else state.mT.contiguous()
    turned_end = None if dstate is None else dstate.mT.contiguous()
    end = None if dstate is None else dstate.contiguous()
    passes = [Shared(q, heads), Shared(k, heads), Shared(v, heads)]
    dots = None
    if gate_grad:
        d, dv = q.shape[-1], v.shape[-1]
        blocks = -(-d // min(c.columns, padded(d, q.dtype)))
        chunks = q.shape[0] * -(-n // c.chunk) if cu_seqlens is None else n // c.chunk + cu_seqlens.shape[0] - 1
        lines = torch.empty(2, blocks, q.shape[0], heads, n, dtype=torch.float32, device=q.device)
        dots = Dots(q, lines[0], torch.empty(chunks, heads, dv, d, dtype=q.dtype, device=q.device), lines[1])
    w = Walk(dout, v, k, heads, scale, log_decay, turned_start, cu_seqlens)
    dq, _ = walk(w, c, passes[0].dtype, dots)
    w = Walk(v, dout, q, heads, scale, log_decay, turned_end, cu_seqlens, reverse=True)
    dk, _ = walk(w, c, passes[1].dtype, None if dots is None else dots._replace(partner=k))
    w = Walk(k, q, dout, heads, scale, log_decay, end, cu_seqlens, reverse=True)
    dv, first = walk(w, c, passes[2].dtype)
    dg = None
    if dots is not None and log_decay is not None:
        dg = dots.dgate.sum(0)
        dg = (dg.sum((0, 2)) if log_decay.ndim == 1 else dg).to(log_decay.dtype)
    return passes[0].share(dq), passes[1].share(dk), passes[2].share(dv), dg, first
