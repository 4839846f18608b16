"""Runs the kernels: plain functions from tensors to tensors, without autograd."""

# pyright: reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.gpu import next_power_of_two
from saccade.ops.scan.triton import channel, delta
from saccade.ops.scan.triton.config import Config, Cut, config, cut, segment_length
from saccade.ops.scan.triton.outputs import outputs
from saccade.ops.scan.triton.segments import carry, carry_delta, segment_maps

NO_GATE, HEAD_GATE, TOKEN_GATE, CHANNEL_GATE = range(4)


class Walk(NamedTuple):
    """What a walk over chunks reads: rows, cols `(B, Hx, N, D)` and vals `(B, Hx, N, Dv)`; heads: H. gate None, `(H,)` or `(B, H, N)`.

    w: under the delta rule, with vals = u. pairs, totals: with a gate per channel, in place of `gate`. start `(S, H, D, Dv)` or None.
    """

    rows: Tensor
    cols: Tensor
    vals: Tensor
    heads: int
    scale: float
    gate: Tensor | None = None
    start: Tensor | None = None
    cu_seqlens: Tensor | None = None
    w: Tensor | None = None
    pairs: Tensor | None = None
    totals: Tensor | None = None
    reverse: bool = False

    @property
    def kind(self) -> int:
        if self.pairs is not None:
            return CHANNEL_GATE
        return NO_GATE if self.gate is None else {1: HEAD_GATE, 3: TOKEN_GATE}[self.gate.ndim]


class Dots(NamedTuple):
    """For the gates' gradients: the tensor whose gradient the walk gives, and what the two walks hand on; see `outputs`."""

    partner: Tensor
    dots: Tensor
    states: Tensor
    dgate: Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, out_dtype: torch.dtype, c: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out `(B, H, N, Dv)` in out_dtype, state `(S, H, D, Dv)` float32) of `scan`."""
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    by_channel = log_decay is not None and log_decay.ndim == 4
    c = c or config(q.shape[-1], v.shape[-1], q.dtype, delta=beta is not None, channel=by_channel)
    w = Walk(q, k, v, heads, scale, None if by_channel else log_decay, state, cu_seqlens)
    if by_channel:
        w = _by_channel(w, log_decay, beta, c)  # type: ignore[arg-type]
    elif beta is not None:
        w = _by_delta(w, beta, c)
    return walk(w, c, out_dtype)


def walk(w: Walk, c: Config, out_dtype: torch.dtype, dots: Dots | None = None) -> tuple[Tensor, Tensor]:
    """(out, last state) of one pass over the sequence, in either direction."""
    batch, n, d, dv = w.rows.shape[0], w.rows.shape[2], w.rows.shape[3], w.vals.shape[3]
    sequences = batch if w.cu_seqlens is None else w.cu_seqlens.shape[0] - 1
    rows, cols, vals = _even(w.rows), _even(w.cols), _even(w.vals)
    bd = max(16, next_power_of_two(d))
    bv = min(c.columns, max(16, next_power_of_two(dv)))
    blocks = _cdiv(dv, bv)
    length = segment_length(c, rows, n, sequences, w.heads, blocks, splits=w.w is None or bd <= 128)
    segments = cut(n, batch, length, w.cu_seqlens)
    starts = _starts(w, c, segments, rows, cols, vals) if segments.split else w.start
    out = torch.empty(batch, w.heads, n, dv, dtype=out_dtype, device=rows.device)
    final = torch.empty(sequences, w.heads, d, dv, dtype=torch.float32, device=rows.device)
    if w.cu_seqlens is not None:  # sequences without tokens have no program that writes their state
        final = final.zero_() if w.start is None else final.copy_(w.start)
    gate, gate_strides = _gate(w, rows)
    extra = dots or Dots(rows, rows, rows, rows)
    partner = _even(extra.partner)
    outputs[(segments.slots * blocks, w.heads)](
        rows, cols, vals, _or(w.w, rows), gate, _or(w.totals, rows), _or(w.pairs, rows), _or(starts, rows), out, final,
        partner, extra.dots, extra.states, extra.dgate, _or(segments.table, rows), batch * w.heads * n, n, segments.per_sequence,
        w.heads, w.scale, *_strides(rows, w.heads), *_strides(cols, w.heads), *_strides(vals, w.heads), *gate_strides,
        *_strides(partner, w.heads),
        d=d, dv=dv, LENGTH=length, CHUNK=c.chunk, BD=bd, BV=bv, BLOCKS=blocks, GATE=w.kind, DELTA=w.w is not None, REVERSE=w.reverse,
        PACKED=w.cu_seqlens is not None, SPLIT=segments.split, START=starts is not None, DOTS=dots is not None,
        PRECISION=c.precision, STAGES=c.walk_stages, num_warps=c.walk_warps,
    )  # fmt: skip
    return out, final


def _starts(w: Walk, c: Config, segments: Cut, rows: Tensor, cols: Tensor, vals: Tensor) -> Tensor:
    """The state that every segment starts from, `(slots, H, D, Dv)` float32."""
    n, d, dv = rows.shape[2], rows.shape[3], vals.shape[3]
    is_delta = w.w is not None
    bd = max(16, next_power_of_two(d))
    bv = min(c.maps_columns, max(16, next_power_of_two(dv)))
    value_blocks = _cdiv(dv, bv)
    blocks = value_blocks + (_cdiv(d, bv) if is_delta else 0)
    gate, gate_strides = _gate(w, rows)
    place = (segments.slots, w.heads)
    added = torch.empty(*place, d, dv, dtype=torch.float32, device=rows.device)
    moved = torch.empty(*place, d, d, dtype=torch.float32, device=rows.device) if is_delta else added
    kept = torch.empty(*place, d, dtype=torch.float32, device=rows.device) if w.kind == CHANNEL_GATE else added.new_empty(place)
    packed = w.cu_seqlens is not None
    segment_maps[(segments.slots * blocks, w.heads)](
        cols, vals, _or(w.w, rows), gate, _or(w.totals, rows), added, kept, moved, _or(segments.table, rows), n, segments.per_sequence,
        w.heads, w.scale, *_strides(cols, w.heads), *_strides(vals, w.heads), *gate_strides,
        d=d, dv=dv,
        LENGTH=segments.length, CHUNK=c.chunk, BD=bd, BV=bv, VALUE_BLOCKS=value_blocks, BLOCKS=blocks, GATE=w.kind, DELTA=is_delta,
        REVERSE=w.reverse, PACKED=packed, PRECISION=c.precision, STAGES=c.maps_stages, num_warps=c.maps_warps,
    )  # fmt: skip
    sequences = rows.shape[0] if w.cu_seqlens is None else w.cu_seqlens.shape[0] - 1
    shared: dict[str, Any] = {"d": d, "dv": dv, "LENGTH": segments.length, "PACKED": packed, "START": w.start is not None}
    if is_delta:
        bv = min(c.carry_columns, max(16, next_power_of_two(dv)))
        carry_delta[(sequences, w.heads, _cdiv(dv, bv))](
            added, moved, _or(w.start, rows), _or(w.cu_seqlens, rows), n, segments.per_sequence, w.heads,
            BD=bd, BV=bv, PRECISION=c.carry, num_warps=c.carry_warps, **shared,
        )  # fmt: skip
    else:
        block = 1024
        carry[(sequences, w.heads, _cdiv(d * dv, block))](
            added, kept, _or(w.start, rows), _or(w.cu_seqlens, rows), n, segments.per_sequence, w.heads,
            BLOCK=block, GATE=w.kind, REVERSE=w.reverse, num_warps=4, **shared,
        )  # fmt: skip
    return added


def _by_delta(w: Walk, beta: Tensor, c: Config) -> Walk:
    k, v = _even(w.cols), _even(w.vals)
    batch, n, d, dv = k.shape[0], k.shape[2], k.shape[3], v.shape[3]
    chunks = cut(n, batch, c.chunk, w.cu_seqlens)
    u = torch.empty(batch, w.heads, n, dv, dtype=v.dtype, device=v.device)
    read = torch.empty(batch, w.heads, n, d, dtype=v.dtype, device=v.device)
    gate, gate_strides = _gate(w, k)
    bv = min(128, max(16, next_power_of_two(dv)))
    delta.transform[(chunks.slots, w.heads)](
        k, v, beta, gate, u, read, _or(chunks.table, k), n, chunks.per_sequence, w.heads,
        *_strides(k, w.heads), *_strides(v, w.heads), *gate_strides, *beta.stride(),
        d=d, dv=dv, CHUNK=c.chunk, BD=max(16, next_power_of_two(d)), BV=bv, VALUE_BLOCKS=_cdiv(dv, bv), GATE=w.kind,
        PACKED=w.cu_seqlens is not None, PRECISION=c.precision, SOLVE=c.solve, num_warps=c.transform_warps,
    )  # fmt: skip
    return w._replace(vals=u, w=read)


def _by_channel(w: Walk, log_decay: Tensor, beta: Tensor | None, c: Config) -> Walk:
    q, k, v, g = _even(w.rows), _even(w.cols), _even(w.vals), _even(log_decay)
    batch, n, d, dv = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    chunks = cut(n, batch, c.chunk, w.cu_seqlens)
    q_gated, k_gated = (torch.empty(batch, w.heads, n, d, dtype=q.dtype, device=q.device) for _ in range(2))
    pairs = torch.empty(chunks.slots, w.heads, c.chunk, c.chunk, dtype=q.dtype, device=q.device)
    totals = torch.empty(chunks.slots, w.heads, d, dtype=torch.float32, device=q.device)
    u = w_ = None
    if beta is not None:
        u = torch.empty(batch, w.heads, n, dv, dtype=v.dtype, device=v.device)
        w_ = torch.empty_like(q_gated)
    bv = min(128, max(16, next_power_of_two(dv)))
    channel.transform[(chunks.slots, w.heads)](
        q, k, v, _or(beta, q), g, q_gated, k_gated, pairs, totals, _or(u, q), _or(w_, q), _or(chunks.table, q), n, chunks.per_sequence,
        w.heads, w.scale, *_strides(q, w.heads), *_strides(k, w.heads), *_strides(v, w.heads), *g.stride()[:3],
        *(beta.stride() if beta is not None else (0, 0, 0)),
        d=d, dv=dv, CHUNK=c.chunk, BD=max(16, next_power_of_two(d)), BV=bv, VALUE_BLOCKS=_cdiv(dv, bv), DELTA=beta is not None,
        PACKED=w.cu_seqlens is not None, PRECISION=c.precision, SOLVE=c.solve, num_warps=c.channel_warps,
    )  # fmt: skip
    return w._replace(rows=q_gated, cols=k_gated, vals=v if u is None else u, w=w_, pairs=pairs, totals=totals)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _even(x: Tensor) -> Tensor:
    """Kernels step through the last axis one by one; the others may lie as they like."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read in place of a tensor that is not there."""
    return other if x is None else x


def _strides(x: Tensor, heads: int) -> tuple[int, int, int, int]:
    b, h, n, _ = x.stride()
    return heads // x.shape[1], b, h, n


def _gate(w: Walk, other: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    if w.gate is None:
        return other, (0, 0, 0)
    if w.gate.ndim == 1:
        return w.gate, (0, w.gate.stride(0), 0)
    b, h, n = w.gate.stride()
    return w.gate, (b, h, n)
