"""Runs the kernels: plain functions from tensors to tensors, without autograd."""

# pyright: reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.gpu import ceil_div
from saccade.ops.scan.triton import channel, delta, solve
from saccade.ops.scan.triton.config import Config, Cut, config, cut, padded, segment_length
from saccade.ops.scan.triton.outputs import outputs
from saccade.ops.scan.triton.segments import carry, carry_delta, segment_maps

NO_GATE, HEAD_GATE, TOKEN_GATE, CHANNEL_GATE, TOKEN_LINES = range(5)


class Walk(NamedTuple):
    """What a walk over chunks reads: rows, cols `(B, Hx, N, D)` and vals `(B, Hx, N, Dv)`; heads: H. gate None, `(H,)` or `(B, H, N)`.

    w: under the delta rule, with vals = u. pairs: products inside chunks, where they were made beforehand. totals: with a gate per
    channel, in place of `gate`. start `(S, H, D, Dv)` or None. inverses: what `prepare` keeps for the backward pass alone. lines
    `(B, H, 2, N)`: weights of a gate a token, read in place of `gate`.
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
    inverses: Tensor | None = None
    lines: Tensor | None = None

    @property
    def kind(self) -> int:
        if self.totals is not None:
            return CHANNEL_GATE
        if self.lines is not None:
            return TOKEN_LINES
        return NO_GATE if self.gate is None else {1: HEAD_GATE, 3: TOKEN_GATE}[self.gate.ndim]


class Maps(NamedTuple):
    """What segments do to a state: added `(slots, H, D, Dv)`, which becomes the state each starts from; moved `(slots, H, D, D)` under
    the delta rule; kept: log2 of the gates, `(slots, H)` or `(slots, H, D)`."""

    added: Tensor
    moved: Tensor
    kept: Tensor


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
    c = c or config(
        q.shape[-1], v.shape[-1], q.dtype, delta=beta is not None, channel=log_decay is not None and log_decay.ndim == 4
    )
    return walk(prepare(q, k, v, log_decay, beta, state, cu_seqlens, scale, c), c, out_dtype)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor | None, cu_seqlens: Tensor | None,
    scale: float, c: Config, keep: bool = False,
) -> Walk:  # fmt: skip
    """What the walks read, after all that can be done chunk by chunk. keep: also what the backward pass wants of a chunk."""
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    by_channel = log_decay is not None and log_decay.ndim == 4
    w = Walk(q, k, v, heads, scale, None if by_channel else log_decay, state, cu_seqlens)
    if by_channel:
        return _by_channel(w, log_decay, beta, c, keep)  # pyright: ignore[reportArgumentType]
    return w if beta is None else _by_delta(w, beta, c, keep)


def walk(w: Walk, c: Config, out_dtype: torch.dtype, dots: Dots | None = None) -> tuple[Tensor, Tensor]:
    """(out, last state) of one pass over the sequence, in either direction."""
    batch, n, d, dv = w.rows.shape[0], w.rows.shape[2], w.rows.shape[3], w.vals.shape[3]
    rows, cols, vals = even(w.rows), even(w.cols), even(w.vals)
    bd, bv, blocks, segments = tiles(w, c)
    starts = segment_starts(w, c, segments).added if segments.split else w.start
    out = torch.empty(batch, w.heads, n, dv, dtype=out_dtype, device=rows.device)
    final = torch.empty(sequences_of(w), w.heads, d, dv, dtype=torch.float32, device=rows.device)
    if w.cu_seqlens is not None:  # sequences without tokens have no program that writes their state
        final = final.zero_() if w.start is None else final.copy_(w.start)
    gate, gate_steps = gate_of(w, rows)
    extra = dots or Dots(rows, rows, rows, rows)
    partner = even(extra.partner)
    outputs[(segments.slots * blocks, w.heads)](
        rows, cols, vals, either(w.w, rows), gate, either(w.totals, rows), either(w.pairs, rows), either(starts, rows), out, final,
        partner, extra.dots, extra.states, extra.dgate, either(segments.table, rows), batch * w.heads * n, n, segments.per_sequence,
        w.heads, w.scale, *strides(rows, w.heads), *strides(cols, w.heads), *strides(vals, w.heads), *gate_steps,
        *strides(partner, w.heads),
        d=d, dv=dv, LENGTH=segments.length, CHUNK=c.chunk, BD=bd, BV=bv, BLOCKS=blocks, GATE=w.kind, DELTA=w.w is not None,
        PAIRS=w.pairs is not None, REVERSE=w.reverse, PACKED=w.cu_seqlens is not None, SPLIT=segments.split, START=starts is not None,
        DOTS=dots is not None,
        PRECISION=c.precision, STAGES=c.walk_stages, num_warps=c.walk_warps,
    )  # fmt: skip
    return out, final


def tiles(w: Walk, c: Config) -> tuple[int, int, int, Cut]:
    """Of a walk: the padded width of keys, that of a block of values, the number of those, and the segments."""
    batch, n, d, dv = w.rows.shape[0], w.rows.shape[2], w.rows.shape[3], w.vals.shape[3]
    bd = padded(d, w.rows.dtype)
    bv = min(c.columns, padded(dv, w.rows.dtype))
    blocks = ceil_div(dv, bv)
    length = segment_length(c, w.rows, n, sequences_of(w), w.heads, blocks, splits=w.w is None or bd <= 128)
    return bd, bv, blocks, cut(n, batch, length, w.cu_seqlens)


def segment_starts(w: Walk, c: Config, segments: Cut, both: bool = False) -> Maps:
    """The state that every segment starts from, in `added`, float32. both: the maps are used from right to left as well."""
    rows, cols, vals = even(w.rows), even(w.cols), even(w.vals)
    n, d, dv = rows.shape[2], rows.shape[3], vals.shape[3]
    is_delta = w.w is not None
    bd = padded(d, rows.dtype)
    bv = min(c.maps_columns, padded(dv, rows.dtype))
    value_blocks = ceil_div(dv, bv)
    blocks = value_blocks + (ceil_div(d, bv) if is_delta else 0)
    gate, gate_steps = gate_of(w, rows)
    place = (segments.slots, w.heads)
    added = torch.empty(*place, d, dv, dtype=torch.float32, device=rows.device)
    moved = torch.empty(*place, d, d, dtype=torch.float32, device=rows.device) if is_delta else added
    kept = torch.empty(*place, d, dtype=torch.float32, device=rows.device) if w.kind == CHANNEL_GATE else added.new_empty(place)
    packed = w.cu_seqlens is not None
    segment_maps[(segments.slots * blocks, w.heads)](
        cols, vals, either(w.w, rows), gate, either(w.totals, rows), added, kept, moved, either(segments.table, rows), n,
        segments.per_sequence, w.heads, w.scale, *strides(cols, w.heads), *strides(vals, w.heads), *gate_steps,
        d=d, dv=dv,
        LENGTH=segments.length, CHUNK=c.chunk, BD=bd, BV=bv, VALUE_BLOCKS=value_blocks, BLOCKS=blocks, GATE=w.kind, DELTA=is_delta,
        REVERSE=w.reverse, PACKED=packed, START=w.start is not None, BOTH=both, PRECISION=c.precision, STAGES=c.maps_stages,
        num_warps=c.maps_warps,
    )  # fmt: skip
    maps = Maps(added, moved, kept)
    carry_over(maps, w, c, segments, w.start, w.reverse)
    return maps


def carry_over(maps: Maps, w: Walk, c: Config, segments: Cut, first: Tensor | None, reverse: bool) -> None:
    """`added` becomes the state before each segment, from `first` `(S, H, D, Dv)`, or the gradient behind each, from that at the end."""
    added, moved, kept = maps
    n, d, dv = w.rows.shape[2], added.shape[2], added.shape[3]
    sequences = sequences_of(w)
    common = (either(first, added), either(w.cu_seqlens, added), n, segments.per_sequence, w.heads)
    shared: dict[str, Any] = {
        "d": d, "dv": dv, "LENGTH": segments.length, "PACKED": w.cu_seqlens is not None, "START": first is not None, "REVERSE": reverse
    }  # fmt: skip
    if w.w is not None:
        bv = min(c.carry_columns, padded(dv, w.rows.dtype))
        carry_delta[(sequences, w.heads, ceil_div(dv, bv))](
            added, moved, *common, BD=padded(d, w.rows.dtype), BV=bv, PRECISION=c.carry, num_warps=c.carry_warps, **shared,
        )  # fmt: skip
    else:
        block = 1024
        carry[(sequences, w.heads, ceil_div(d * dv, block))](added, kept, *common, BLOCK=block, GATE=w.kind, num_warps=4, **shared)


def _by_delta(w: Walk, beta: Tensor, c: Config, keep: bool = False) -> Walk:
    q, k = even(w.rows), even(w.cols)
    batch, n, d = k.shape[0], k.shape[2], k.shape[3]
    chunks = cut(n, batch, c.chunk, w.cu_seqlens)
    pairs, systems = _squares(chunks, w.heads, c, k.dtype, k), _squares(chunks, w.heads, c, torch.float32, k)
    gate, gate_steps = gate_of(w, k)
    per_token = w.kind == TOKEN_GATE
    lines = torch.empty(batch, w.heads, 2, n, dtype=torch.float32, device=k.device) if per_token else None
    delta.products[(chunks.slots, w.heads)](
        q, k, gate, pairs, systems, either(lines, k), either(chunks.table, k), n, chunks.per_sequence, w.heads, w.scale,
        *strides(q, w.heads), *strides(k, w.heads), *gate_steps,
        d=d, CHUNK=c.chunk, BD=padded(d, k.dtype), GATE=w.kind, PACKED=w.cu_seqlens is not None, PRECISION=c.precision,
        num_warps=c.products_warps,
    )  # fmt: skip
    return _solved(w._replace(pairs=pairs, lines=lines), systems, k, None, beta, chunks, c, keep)


def _by_channel(w: Walk, log_decay: Tensor, beta: Tensor | None, c: Config, keep: bool = False) -> Walk:
    q, k, g = even(w.rows), even(w.cols), even(log_decay)
    batch, n, d = q.shape[0], q.shape[2], q.shape[3]
    chunks = cut(n, batch, c.chunk, w.cu_seqlens)
    is_delta = beta is not None
    q_gated, k_gated = (torch.empty(batch, w.heads, n, d, dtype=q.dtype, device=q.device) for _ in range(2))
    read = torch.empty_like(q_gated) if is_delta else None
    pairs = _squares(chunks, w.heads, c, q.dtype, q)
    systems = _squares(chunks, w.heads, c, torch.float32, q) if is_delta else None
    totals = torch.empty(chunks.slots, w.heads, d, dtype=torch.float32, device=q.device)
    bd = min(c.channel_columns, padded(d, q.dtype))
    channel.products[(c.chunk // 16 * chunks.slots, w.heads)](
        q, k, g, q_gated, k_gated, either(read, q), pairs, either(systems, q), totals, either(chunks.table, q), n, chunks.per_sequence,
        w.heads, w.scale, *strides(q, w.heads), *strides(k, w.heads), *g.stride()[:3],
        d=d, CHUNK=c.chunk, BD=bd, CHANNEL_BLOCKS=max(2, ceil_div(d, bd)), DELTA=is_delta,
        PACKED=w.cu_seqlens is not None, STAGES=c.channel_stages, PRECISION=c.precision, num_warps=c.channel_warps,
        maxnreg=c.channel_registers,
    )  # fmt: skip
    w = w._replace(rows=q_gated, cols=k_gated, pairs=pairs, totals=totals)
    if beta is None or systems is None or read is None:
        return w
    return _solved(w, systems, read, read, beta, chunks, c, keep)


def _solved(w: Walk, systems: Tensor, read: Tensor, into: Tensor | None, beta: Tensor, chunks: Cut, c: Config, keep: bool) -> Walk:
    """The UT transform of all chunks. read: the keys as the state is read with; into: where w goes, which may be the same."""
    v = even(w.vals)
    batch, n, d, dv = v.shape[0], v.shape[2], read.shape[3], v.shape[3]
    u = torch.empty(batch, w.heads, n, dv, dtype=v.dtype, device=v.device)
    into = torch.empty(batch, w.heads, n, d, dtype=v.dtype, device=v.device) if into is None else into
    inverses = _squares(chunks, w.heads, c, v.dtype, v) if keep else None
    gate, gate_steps = gate_of(w, v)
    bv = min(128, padded(dv, v.dtype))
    solve.transform[(chunks.slots, w.heads)](
        systems, read, v, beta, gate, u, into, either(inverses, v), either(chunks.table, v), n, chunks.per_sequence, w.heads,
        *strides(read, w.heads), *strides(v, w.heads), *gate_steps, *beta.stride(),
        d=d, dv=dv, CHUNK=c.chunk, BD=padded(d, v.dtype), BV=bv, VALUE_BLOCKS=ceil_div(dv, bv), GATE=w.kind,
        PACKED=w.cu_seqlens is not None, KEEP=keep, PRECISION=c.precision, SOLVE=c.solve, num_warps=c.transform_warps,
    )  # fmt: skip
    return w._replace(vals=u, w=into, inverses=inverses)


def _squares(chunks: Cut, heads: int, c: Config, dtype: torch.dtype, x: Tensor) -> Tensor:
    return torch.empty(chunks.slots, heads, c.chunk, c.chunk, dtype=dtype, device=x.device)


def sequences_of(w: Walk) -> int:
    return w.rows.shape[0] if w.cu_seqlens is None else w.cu_seqlens.shape[0] - 1


def even(x: Tensor) -> Tensor:
    """Kernels step through the last axis one by one; the others may lie as they like."""
    return x if x.stride(-1) == 1 else x.contiguous()


def either(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is not read in place of a tensor that is not there."""
    return other if x is None else x


def strides(x: Tensor, heads: int) -> tuple[int, int, int, int]:
    b, h, n, _ = x.stride()
    return heads // x.shape[1], b, h, n


def gate_of(w: Walk, other: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    if w.lines is not None:
        return w.lines, (w.lines.stride(0), w.lines.stride(1), w.lines.stride(2))
    if w.gate is None:
        return other, (0, 0, 0)
    if w.gate.ndim == 1:
        return w.gate, (0, w.gate.stride(0), 0)
    b, h, n = w.gate.stride()
    return w.gate, (b, h, n)


class Shared:
    """The gradient of a tensor whose heads are shared by groups: every head has its own at first, in float32 where they are to be added."""

    def __init__(self, x: Tensor, heads: int) -> None:
        self.group, self.target = heads // x.shape[1], x.dtype
        self.dtype = x.dtype if self.group == 1 else torch.float32

    def share(self, grad: Tensor) -> Tensor:
        return grad if self.group == 1 else grad.unflatten(1, (-1, self.group)).sum(2).to(self.target)
