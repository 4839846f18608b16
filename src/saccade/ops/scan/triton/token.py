"""One token of the recurrence in one kernel: a state is read and written once, and nothing else but vectors."""

# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saccade.ops.gpu import ceil_div, next_power_of_two
from saccade.ops.scan.problem import Problem

COLUMNS = 4096  # entries of a state that a program holds


@triton.jit
def _token(
    q, k, v, gate, beta, state, out, new, q_b, q_h, q_d, k_b, k_h, k_d, v_b, v_h, v_d, gate_b, gate_h, gate_d, beta_b, beta_h,
    heads, q_share, k_share, v_share, scale, D: tl.constexpr, DV: tl.constexpr, GATED: tl.constexpr, DELTA: tl.constexpr,
    START: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b, h = pid // heads, pid % heads
    d, c = tl.arange(0, BD), tl.program_id(1) * BV + tl.arange(0, BV)
    entry = (pid * D + d[:, None]) * DV + c[None, :]
    inside = (d < D)[:, None] & (c < DV)[None, :]
    keys = tl.load(k + b * k_b + (h // k_share) * k_h + d * k_d, mask=d < D, other=0.0).to(tl.float32)
    values = tl.load(v + b * v_b + (h // v_share) * v_h + c * v_d, mask=c < DV, other=0.0).to(tl.float32)
    queries = tl.load(q + b * q_b + (h // q_share) * q_h + d * q_d, mask=d < D, other=0.0).to(tl.float32)
    held = tl.zeros([BD, BV], tl.float32)
    if START:
        held = tl.load(state + entry, mask=inside, other=0.0)
        if GATED:
            # of a gate per head or token all channels read the same number
            held = held * tl.exp(tl.load(gate + b * gate_b + h * gate_h + d * gate_d, mask=d < D, other=0.0).to(tl.float32))[:, None]
    if DELTA:
        strength = tl.load(beta + b * beta_b + h * beta_h).to(tl.float32)
        values = strength * (values - tl.sum(held * keys[:, None], axis=0))
    held = held + keys[:, None] * values[None, :]
    tl.store(new + entry, held, mask=inside)
    read = scale * tl.sum(held * queries[:, None], axis=0)
    tl.store(out + pid * DV + c, read.to(out.dtype.element_ty), mask=c < DV)


def token(problem: Problem) -> tuple[Tensor, Tensor]:
    """(out `(B, H, 1, Dv)`, state `(B, H, D, Dv)` float32) of a problem of one token; out is float32 where the problem wants it wide."""
    p, heads = problem, problem.heads
    q, k, v, g = p.q, p.k, p.v, p.log_decay
    batch, d, dv = q.shape[0], q.shape[3], v.shape[3]
    out = torch.empty((batch, heads, 1, dv), dtype=torch.float32 if p.wide_out else q.dtype, device=q.device)
    new = torch.empty((batch, heads, d, dv), dtype=torch.float32, device=q.device)
    steps = (0, 0, 0)
    if g is not None:
        steps = (0, g.stride(0), 0) if g.ndim == 1 else (g.stride(0), g.stride(1), g.stride(3) if g.ndim == 4 else 0)
    rows = next_power_of_two(d)
    columns = min(next_power_of_two(dv), max(1, COLUMNS // rows))
    if new.numel():
        _token[(batch * heads, ceil_div(dv, columns))](
            q, k, v, q if g is None else g, q if p.beta is None else p.beta, new if p.state is None else p.state.float().contiguous(),
            out, new, *(x.stride(i) for x in (q, k, v) for i in (0, 1, 3)), *steps,
            *((0, 0) if p.beta is None else p.beta.stride()[:2]), heads, heads // q.shape[1], heads // k.shape[1], heads // v.shape[1],
            p.scale, D=d, DV=dv, GATED=g is not None, DELTA=p.beta is not None, START=p.state is not None, BD=rows, BV=columns, num_warps=4,
        )  # fmt: skip
    return out, new
