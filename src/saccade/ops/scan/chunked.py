"""Plain torch, chunk by chunk: matmuls inside a chunk and one short step from chunk to chunk. Any device, differentiable.

With S the state at the start of a chunk of C tokens, P_i = g_1 + ... + g_i (from the chunk's start, own gate included) and
R_j = g_{j+1} + ... + g_C (to the chunk's end), per token or per channel:

    out  = scale * ((q e^P) S + A V'),        A_ij = sum_c q_ic k_jc e^(P_ic - P_jc)   for j <= i
    S   <- e^(P_C) S + (k e^R)^T V'
    V'   = V, or under the delta rule the solution of (I + diag(beta) L) V' = diag(beta) (V - (k e^P) S),
           L_ij = sum_c k_ic k_jc e^(P_ic - P_jc)  for j < i  (the UT transform: one triangular solve gives U and W with V' = U - W S)

Long decays. e^(-P_j) alone overflows, and even the difference P_i - P_j loses its digits where |P| is large. So no difference is ever
taken: every exponent is a sum of gates between two tokens, none of them positive. Per token, a C x C table holds those sums. Per
channel such a table would have C * C * D entries; there the chunk is halved again and again: a pair of tokens is parted by exactly one
boundary, the one between the two halves of some block, and its weight is e^(gates from the boundary to i) * e^(gates after j to the
boundary), a product of two factors of at most 1 that belong to one token each: a matmul. A gate of -inf forgets everything before it.

Sources: deltanet, kimi-linear, lightning-attention-2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.gpu import next_power_of_two
from saccade.ops.scan.problem import Problem
from saccade.ops.scan.reference import by_sequence

CHUNK = 64
PIECE = 1 << 20  # bytes of queries in a piece: what is computed on the way stays in a processor's cache


def scan(problem: Problem, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """(out `(B, H, N, Dv)`, state `(S, H, D, Dv)`), both in the dtype of computation. chunk: a power of two.

    On a CPU long sequences go through in pieces of a few chunks, the state handed on.
    """
    if problem.cu_seqlens is not None:
        return by_sequence(lambda part: scan(part, chunk), problem)
    p, outs = problem.widened(), []
    n = p.q.shape[2]
    piece = max(1, PIECE // (p.q[:, :, :chunk].nbytes or 1)) * chunk if p.q.device.type == "cpu" else n
    for begin in range(0, max(n, 1), max(piece, 1)):
        out, state = _scan(p if piece >= n else p.tokens(begin, min(begin + piece, n)), chunk)
        outs.append(out)
        p = replace(p, state=state)
    assert p.state is not None
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), p.state


def _scan(p: Problem, chunk: int) -> tuple[Tensor, Tensor]:
    """The same of a widened problem, all chunks at once."""
    n = p.q.shape[2]
    size = min(chunk, next_power_of_two(n))
    q, k, v = (_chunks(x, size) for x in (p.q * p.scale, p.k, p.v))
    g = None if p.log_decay is None else _chunks(p.log_decay, size)
    rows = (q,) if p.beta is None else (q, k)
    if g is None:
        products, before, after = tuple((x @ k.mT).tril() for x in rows), None, None
    elif g.ndim == 4:
        products, before, after = _per_token(rows, k, g)
    else:
        products, before, after = _per_channel(rows, k, g)
    into = q if before is None else q * before
    out_of = k if after is None else k * after
    kept = None if before is None else before[..., -1, :, None]
    assert p.state is not None
    if p.beta is None:
        starts, state = _add_up(out_of.mT @ v, kept, p.state)
        new = v
    else:
        beta = _chunks(p.beta, size)[..., None]
        read = beta * (k if before is None else k * before)
        system = (beta * products[1]).tril(-1)
        solved = torch.linalg.solve_triangular(system, torch.cat([beta * v, read], dim=-1), upper=False, unitriangular=True)
        u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        starts, new, state = _correct(u, w, out_of, kept, p.state)
    out = into @ starts + products[0] @ new
    return out.flatten(2, 3)[:, :, :n], state


def _chunks(x: Tensor, size: int) -> Tensor:
    """`(B, H, N, ...)` as `(B, H, chunks, size, ...)`; the tail is filled with zeros, which leave the state as it is."""
    short = -x.shape[2] % size
    if short:
        x = pad(x, (0, short)) if x.ndim == 3 else pad(x, (0, 0, 0, short))
    return x.unflatten(2, (-1, size))


def _per_token(rows: tuple[Tensor, ...], k: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    size = g.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=g.device).tril(-1)
    # entry (i, j): the gates after j up to i; the running sum starts at j, so it never holds what has to be taken away again
    between = g[..., :, None].expand(*g.shape, size).masked_fill(~lower, 0.0).cumsum(-2)
    weight = between.exp().tril()
    before = g.cumsum(-1).exp()
    after = pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1).exp()
    return tuple((x @ k.mT) * weight for x in rows), before[..., None], after[..., None]


def _per_channel(rows: tuple[Tensor, ...], k: Tensor, g: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Blocks of 1, 2, 4, ... tokens: `done` holds the products inside each block, `to` and `left` the gates from its start, to its end."""
    size = g.shape[-2]
    done = [(x * k).sum(-1)[..., None, None] for x in rows]
    to, left = g[..., None, :], torch.zeros_like(g)[..., None, :]
    block = 1
    while block < size:
        first, second = to[..., 0::2, :, :], to[..., 1::2, :, :]
        tail = left[..., 0::2, :, :]
        columns = (_blocks(k, block)[..., 0::2, :, :] * tail.exp()).mT
        weight = second.exp()
        joined = []
        for x, inside in zip(rows, done, strict=True):
            across = (_blocks(x, block)[..., 1::2, :, :] * weight) @ columns
            above = torch.cat([inside[..., 0::2, :, :], torch.zeros_like(across)], dim=-1)
            joined.append(torch.cat([above, torch.cat([across, inside[..., 1::2, :, :]], dim=-1)], dim=-2))
        done = joined
        left = torch.cat([tail + second[..., -1:, :], left[..., 1::2, :, :]], dim=-2)
        to = torch.cat([first, second + first[..., -1:, :]], dim=-2)
        block *= 2
    return tuple(x.squeeze(-3) for x in done), to.squeeze(-3).exp(), left.squeeze(-3).exp()


def _blocks(x: Tensor, block: int) -> Tensor:
    return x.unflatten(-2, (-1, block))


def _add_up(added: Tensor, kept: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states at the chunks' starts, from what each chunk adds and keeps; and the last one."""
    starts = []
    for c in range(added.shape[2]):
        starts.append(state)
        state = (state if kept is None else kept[:, :, c] * state) + added[:, :, c]
    return torch.stack(starts, dim=2), state


def _correct(u: Tensor, w: Tensor, out_of: Tensor, kept: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same under the delta rule, where what a chunk adds depends on the state it meets; also the corrected values V'."""
    starts, new = [], []
    for c in range(u.shape[2]):
        starts.append(state)
        new.append(u[:, :, c] - w[:, :, c] @ state)
        state = (state if kept is None else kept[:, :, c] * state) + out_of[:, :, c].mT @ new[-1]
    return torch.stack(starts, dim=2), torch.stack(new, dim=2), state
