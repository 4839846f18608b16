"""Dense attention: torch's fused kernels where they can, query tiles in plain torch where they can't."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.core import Partial, merge
from saccade.ops.attend.features import by_query_head, counted_only, join_sinks, row_bounds
from saccade.ops.attend.problem import Problem
from saccade.ops.attend.rectangles import assemble, rectangles
from saccade.ops.attend.tile import attend_tile, cpu_flash

ROWS = 256  # query rows per tile where no fused kernel applies


def attend(problem: Problem) -> tuple[str, Partial]:
    """The name of what ran and its result."""
    done = fused(problem)
    if done is not None:
        return done
    if problem.sinks is not None:
        name, part = attend(replace(problem, sinks=None, return_lse=True))
        part = join_sinks(part, problem.sinks)
        return name, part if problem.return_lse else Partial(part.out, None)
    if problem.ragged and problem.q.device.type == "cpu":
        names: set[str] = set()

        def parts():
            for where in rectangles(problem):
                name, part = attend(where.problem)
                names.add(name)
                yield where, part

        part = assemble(problem, parts())
        return "+".join(sorted(names)) or "dense", part
    return "tiled", _tiled(problem)


def fused(problem: Problem) -> tuple[str, Partial] | None:
    """The same where one of torch's fused kernels, or nothing at all, has to run; else None."""
    q, k, v = problem.q, problem.k, problem.v
    n_q, n_k = q.shape[2], k.shape[2]
    if (n_q == 0 or n_k == 0) and problem.sinks is None:
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        return "dense", Partial(q.new_zeros(*q.shape[:3], v.shape[-1]), lse if problem.return_lse else None)
    if not problem.plain:
        return None
    if not problem.return_lse and (not problem.causal or n_q in (1, n_k)):
        return "sdpa", Partial(_sdpa(problem, causal=problem.causal and n_q > 1), None)
    if problem.causal and 1 < n_q < n_k and (not problem.return_lse or q.dtype in (torch.float32, torch.float64)):
        # new rows over old keys: what is older is wholly visible, what is new is a causal square. In half precision a result that
        # is merged once more would be rounded twice
        past, new = n_k - n_q, slice(n_k - n_q, None)
        old = _with_lse(q, k[:, :, :past], v[:, :, :past], problem, causal=False)
        own = _with_lse(q, k[:, :, new], v[:, :, new], problem, causal=True)
        if old is not None and own is not None:
            both = merge(old, own)
            return "sdpa+lse", both if problem.return_lse else Partial(both.out, None)
    if not problem.causal or n_q in (1, n_k):
        part = _with_lse(q, k, v, problem, causal=problem.causal and n_q > 1)
        if part is not None:
            return "sdpa+lse", part
    return None


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
            out, lse = cpu_flash(layout.to_groups(q).flatten(2, 3), k, v, problem.scale)
            return Partial(
                out.unflatten(2, (layout.group, n_q)).flatten(1, 2), lse.unflatten(2, (layout.group, n_q)).flatten(1, 2)
            )
        k, v = (x.repeat_interleave(layout.group, dim=1) if layout.group > 1 else x for x in (k, v))
        return Partial(*cpu_flash(q, k, v, problem.scale, causal=causal))
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.shape[-1] % 8 == 0:
        k, v = (x.repeat_interleave(layout.group, dim=1) if layout.group > 1 else x for x in (k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=problem.scale)
        return Partial(out, lse[:, :, :n_q])
    return None


def _tiled(problem: Problem) -> Partial:
    """Tiles of query rows over all keys they can see, in plain torch: softcap, biases, positions, any dtype, differentiable."""
    q, layout = problem.q, problem.layout
    n_q, n_k = q.shape[2], problem.k.shape[2]
    k, v = (counted_only(problem, x).unsqueeze(2) for x in (problem.k, problem.v))
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for begin in range(0, n_q, ROWS):
        end = min(begin + ROWS, n_q)
        last = n_k - n_q + end if problem.causal and not problem.masked else n_k
        last = max(last, 1)
        part = attend_tile(
            layout.to_groups(q[:, :, begin:end]), k[..., :last, :], v[..., :last, :], _mask(problem, begin, end, last),
            scale=problem.scale, softcap=problem.softcap, bias=_bias(problem, begin, end, last), return_lse=True,
        )  # fmt: skip
        assert part.lse is not None
        outs.append(part.out.flatten(1, 2))
        lses.append(part.lse.flatten(1, 2))
    return Partial(torch.cat(outs, dim=2), torch.cat(lses, dim=2) if problem.return_lse else None)


def _mask(problem: Problem, begin: int, end: int, last: int) -> Tensor | None:
    """Additive mask, 0 or -inf, of rows begin ... end - 1 over the first `last` keys, broadcastable to `(B, Hk, group, rows, last)`."""
    device, n_q, n_k = problem.q.device, problem.q.shape[2], problem.k.shape[2]
    keys = torch.arange(last, device=device)
    seen: Tensor | None = None
    bounds = row_bounds(problem)
    if bounds is not None:
        lo, hi = (x[:, None, None, begin:end, None] for x in bounds)
        seen = (keys >= lo) & (keys < hi)
    if problem.q_positions is not None and problem.k_positions is not None:
        rows, columns = (problem.layout.to_groups(by_query_head(x, problem.q.shape[1])) for x in (problem.q_positions, problem.k_positions))
        ordered = columns.unsqueeze(3) <= rows[..., begin:end].unsqueeze(4)
        seen = ordered if seen is None else seen & ordered
    elif problem.causal and bounds is None:
        seen = keys <= torch.arange(begin, end, device=device)[:, None] + n_k - n_q
    return None if seen is None else torch.zeros(seen.shape, device=device).masked_fill(~seen, -torch.inf)


def _bias(problem: Problem, begin: int, end: int, last: int) -> Tensor | None:
    """The biases of these rows and keys, broadcastable to `(B, Hk, group, rows, last)`."""
    total: Tensor | None = None
    if problem.bias is not None:
        bias = problem.bias
        bias = bias[:, :, begin:end] if bias.shape[2] > 1 else bias
        total = bias[..., :last] if bias.shape[3] > 1 else bias
    if problem.low_rank is not None:
        exact = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
        a, b = (x.to(exact) for x in problem.low_rank)
        product = a[:, :, begin:end] @ b[:, :, :last].mT
        total = product if total is None else product + total.to(exact)
    if total is None:
        return None
    return problem.layout.to_groups(total) if total.shape[1] > 1 else total.unsqueeze(2)
