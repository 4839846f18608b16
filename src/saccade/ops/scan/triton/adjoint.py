"""Gradients of the forms with the delta rule and of those with gates per channel.

Chunks are prepared as in the forward pass; one walk keeps the states, one from right to left their gradients (`states`); then every
chunk ends on its own: `pairs`, and `tokens` or `levels`.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.gpu import ceil_div
from saccade.ops.scan.triton.config import Config, config, cut, padded
from saccade.ops.scan.triton.launch import (
    CHANNEL_GATE,
    Shared,
    Walk,
    carry_over,
    either,
    even,
    gate_of,
    prepare,
    segment_starts,
    sequences_of,
    strides,
    tiles,
)
from saccade.ops.scan.triton.levels import channel_gradients
from saccade.ops.scan.triton.near import add_near
from saccade.ops.scan.triton.pairs import pair_gradients
from saccade.ops.scan.triton.states import keep_state_gradients, keep_states
from saccade.ops.scan.triton.tokens import token_gradients

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


def backward(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None, scale: float, gate_grad: bool, c: Config | None = None,
) -> Gradients:  # fmt: skip
    """(dq, dk, dv, dlog_decay or None, dbeta or None, dstate at the start), from dout `(B, H, N, Dv)` and dstate `(S, H, D, Dv)`."""
    c = c or config(
        q.shape[-1], v.shape[-1], q.dtype, delta=beta is not None, channel=log_decay is not None and log_decay.ndim == 4
    )
    dout = even(dout.to(q.dtype))
    end = None if dstate is None else dstate.contiguous()
    state = None if state is None else state.contiguous()
    w = prepare(q, k, v, log_decay, beta, state, cu_seqlens, scale, c, keep=True)
    shared = [Shared(x, w.heads) for x in (q, k, v)]
    new, back, states, ends, first = _states(w, dout, end, shared[2].dtype, c)
    dq, dk, dv, dg, dbeta = _chunks(w, q, k, v, log_decay, beta, dout, new, back, states, ends, gate_grad, [x.dtype for x in shared], c)
    if dg is not None and log_decay is not None:
        dg = (dg.sum((0, 2)) if log_decay.ndim == 1 else dg).to(log_decay.dtype)
    dbeta = None if dbeta is None or beta is None else dbeta.to(beta.dtype)
    return shared[0].share(dq), shared[1].share(dk), shared[2].share(dv), dg, dbeta, first


def _states(w: Walk, dout: Tensor, end: Tensor | None, dtype: torch.dtype, c: Config) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(V', dV', states before chunks, gradients of states behind chunks, gradient of the first state); V' takes the place of u."""
    rows, cols, vals = even(w.rows), even(w.cols), even(w.vals)
    batch, n, d, dv = rows.shape[0], rows.shape[2], rows.shape[3], vals.shape[3]
    is_delta, packed = w.w is not None, w.cu_seqlens is not None
    bd, bv, blocks, segments = tiles(w, c.back)
    place = (cut(n, batch, c.chunk, w.cu_seqlens).slots, w.heads, d, dv)
    states, ends = (torch.empty(place, dtype=rows.dtype, device=rows.device) for _ in range(2))
    maps = segment_starts(w, c, segments, both=True) if segments.split else None
    starts = w.start if maps is None else maps.added
    gate, gate_steps = gate_of(w, rows)
    table, w_, totals = either(segments.table, rows), either(w.w, rows), either(w.totals, rows)
    grid = (segments.slots * blocks, w.heads)
    sizes: dict[str, Any] = {
        "d": d, "dv": dv, "LENGTH": segments.length, "CHUNK": c.chunk, "BD": bd, "BV": bv, "BLOCKS": blocks, "GATE": w.kind,
        "DELTA": is_delta, "PACKED": packed, "PRECISION": c.precision, "num_warps": c.walk_warps,
    }  # fmt: skip
    keep_states[grid](
        cols, vals, w_, gate, totals, either(starts, rows), states, vals, table, n, segments.per_sequence, w.heads,
        *strides(cols, w.heads), *strides(vals, w.heads), *gate_steps, SPLIT=segments.split, START=starts is not None,
        STAGES=c.walk_stages, **sizes,
    )  # fmt: skip

    back = torch.empty(batch, w.heads, n, dv, dtype=rows.dtype if is_delta else dtype, device=rows.device)
    first = torch.empty(end.shape if end is not None else (sequences_of(w), w.heads, d, dv), dtype=torch.float32, device=rows.device)
    if packed:  # sequences without tokens hand on what they are given
        first = first.zero_() if end is None else first.copy_(end)

    def walk(begin: Tensor | None, last: Tensor, keep: bool, split: bool) -> None:
        keep_state_gradients[grid](
            rows, cols, w_, w.pairs, dout, gate, totals, either(begin, rows), ends, back, last, table, n, segments.per_sequence, w.heads,
            w.scale, *strides(rows, w.heads), *strides(cols, w.heads), *strides(dout, w.heads), *gate_steps, SPLIT=split,
            START=begin is not None, KEEP=keep, STAGES=c.back_stages, **sizes,
        )  # fmt: skip

    if maps is None:
        walk(end, first, keep=True, split=False)
    else:
        behind = maps._replace(added=torch.empty_like(maps.added))
        walk(None, behind.added, keep=False, split=False)
        carry_over(behind, w, c, segments, end, reverse=True)
        walk(behind.added, first, keep=True, split=True)
    return vals, back, states, ends, first


def _chunks(
    w: Walk, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, dout: Tensor, new: Tensor, back: Tensor,
    states: Tensor, ends: Tensor, gate_grad: bool, dtypes: list[torch.dtype], c: Config,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dq, dk, dv) of every head in `dtypes`, the gates' gradient, of shared ones a token, and dbeta, in float32."""
    q, k, v = even(q), even(k), even(v)
    (batch, _, n, d), dv = q.shape, v.shape[3]
    chunks = cut(n, batch, c.chunk, w.cu_seqlens)
    by_channel = w.kind == CHANNEL_GATE
    dq, dk = (torch.empty(batch, w.heads, n, d, dtype=dtype, device=q.device) for dtype in dtypes[:2])
    dval = back if beta is None else torch.empty(batch, w.heads, n, dv, dtype=dtypes[2], device=q.device)
    by_query, by_key = (torch.empty(chunks.slots, w.heads, c.chunk, c.chunk, dtype=q.dtype, device=q.device) for _ in range(2))
    dg = torch.empty(batch, w.heads, n, dtype=torch.float32, device=q.device)
    if by_channel and log_decay is not None:
        dg = torch.empty(log_decay.shape, dtype=log_decay.dtype, device=q.device) if gate_grad else dg
        gates = even(log_decay)
        gate, gate_steps = gates, gates.stride()[:3]
    else:
        gate, gate_steps = gate_of(w._replace(lines=None), q)
    beta_steps = (0, 0, 0) if beta is None else beta.stride()
    table, beta_ = either(chunks.table, q), either(beta, q)
    bv = min(c.grad_values, padded(dv, q.dtype))
    bd = min(c.level_columns if by_channel else c.grad_columns, padded(d, q.dtype))
    # two at least: with one the loop over blocks is no loop, and Triton 3.6 then gave wrong dk on sm_90
    blocks = max(2, ceil_div(d, bd))
    dbeta = torch.empty(blocks + 2 if by_channel else 1, batch, w.heads, n, dtype=torch.float32, device=q.device)
    sizes: dict[str, Any] = {
        "d": d, "dv": dv, "CHUNK": c.chunk, "BD": bd, "CHANNEL_BLOCKS": blocks, "BV": bv, "VALUE_BLOCKS": ceil_div(dv, bv),
        "PACKED": w.cu_seqlens is not None, "GATE_GRAD": gate_grad and log_decay is not None, "PRECISION": c.precision,
    }  # fmt: skip
    after = (table, n, chunks.per_sequence, w.heads, w.scale, *strides(q, w.heads), *strides(k, w.heads))
    read = (*strides(new, w.heads), *strides(dout, w.heads))
    grid = (chunks.slots, w.heads)
    pair_gradients[grid](
        q, k, v, dout, new, back, either(w.inverses, q), beta_, gate, by_query, by_key, dval, dbeta, dg, *after,
        *strides(v, w.heads), *read, *gate_steps, *beta_steps, GATE=w._replace(lines=None).kind, DELTA=beta is not None,
        num_warps=c.pair_warps, num_stages=c.pair_stages, **sizes,
    )  # fmt: skip
    if by_channel:
        channel_gradients[(chunks.slots * blocks, w.heads)](
            q, k, beta_, gate, dout, new, back, by_query, by_key, states, ends, w.totals, dq, dk, dbeta[2:], dg, batch * w.heads * n,
            *after, *read, *gate_steps, *beta_steps,
            LEVELS=c.chunk.bit_length() - 1, DELTA=beta is not None, num_warps=c.level_warps, num_stages=c.level_stages, **sizes,
        )  # fmt: skip
        bd = min(c.near_columns, padded(d, q.dtype))
        add_near[(c.chunk // 16 * chunks.slots, w.heads)](
            q, k, beta_, gate, by_query, by_key, dq, dk, dbeta[1], dg, table, n, chunks.per_sequence, w.heads, *strides(q, w.heads),
            *strides(k, w.heads), *gate_steps, *beta_steps,
            d=d, CHUNK=c.chunk, BD=bd, CHANNEL_BLOCKS=max(2, ceil_div(d, bd)), DELTA=beta is not None, PACKED=w.cu_seqlens is not None,
            GATE_GRAD=sizes["GATE_GRAD"], STAGES=c.near_stages, PRECISION=c.precision, num_warps=1, maxnreg=c.near_registers,
        )  # fmt: skip
    else:
        weights, weight_steps = gate_of(w, q)
        token_gradients[grid](
            q, k, beta_, weights, dout, new, back, by_query, by_key, states, ends, dq, dk, dbeta, dg, *after, *read,
            *weight_steps, *beta_steps, GATE=w.kind, num_warps=c.grad_warps, num_stages=c.grad_stages, **sizes,
        )  # fmt: skip
    gate_line = dg if gate_grad and log_decay is not None else None
    return dq, dk, dval, gate_line, None if beta is None else dbeta.sum(0)
