"""attend: softmax attention over a Selection.

    out_i = sum_j p_ij v_j,   p_ij = exp(l_ij) / (exp(sink) + sum_j' exp(l_ij')),
    l_ij = cap(scale * q_i.k_j) + bias_ij + a_i.b_j + log_weight_j

over the keys j that query i reads. Implementations: `reference` (dense mask, differentiable, any dtype: the oracle), `cpu` (gathers
the listed keys and touches no others; plain torch, made for CPUs, runs on any device), `triton` (kernels for GPUs, differentiable),
`flex` (torch FlexAttention, compiled). `auto` takes the kernels on a GPU and `cpu` elsewhere; without a selection, plain dense
attention goes to torch's scaled_dot_product_attention. `saccade.last_run()` says which it was, and names two where extra keys went
another way than the rest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Partial, Selection, check_attention_inputs, merge
from saccade.ops.attend import cpu, dense, flex, reference
from saccade.ops.attend.features import check, check_state, join_sinks, row_positions
from saccade.ops.attend.low_bit import attend_low_bit
from saccade.ops.attend.problem import ExtraKeys, LowRank, Problem
from saccade.ops.autocast import alike
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note

Impl = Literal["auto", "reference", "cpu", "triton", "flex"]
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "flex")

__all__ = ["IMPLEMENTATIONS", "ExtraKeys", "Impl", "attend", "attend_low_bit"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    extra_keys: ExtraKeys | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    lengths: Tensor | None = None,
    starts: Tensor | None = None,
    sinks: Tensor | None = None,
    low_rank_bias: tuple[Tensor, Tensor] | None = None,
    state: Partial | None = None,
) -> Partial:
    """Attention of q `(B, Hq, Nq, D)` over k `(B, Hk, Nk, D)`, v `(B, Hk, Nk, Dv)`; Hk divides Hq.

    selection: the keys each query reads; its own `causal` holds. None: every visible key.
    causal: queries are the last Nq positions of Nk and see the keys up to their own. scale: default D ** -0.5.
    softcap: `cap * tanh(logit / cap)` before the bias. bias: added to the logits, broadcastable to `(B, Hq, Nq, Nk)`.
    extra_keys: keys outside the sequence that every query reads inside the same softmax.
    return_lse: also give the log-sum-exp, which `merge` needs (dense attention is a little slower with it).
    q_positions, k_positions: int32 or int64 `(B or 1, H or 1, Nq)` and `(.., Nk)`, H being Hk or Hq. With causal=True query i then sees
        key j iff k_position_j <= q_position_i, in whatever order the rows lie; one of them alone: the rows of the other count up, as
        they do without positions. A selection lists rows as they lie; `causal` holds instead of the selection's own.
    cu_seqlens_q, cu_seqlens_k: int32 `(S + 1,)` for B = 1: sequence s has the rows from entry s to entry s + 1; its queries see its
        keys only, and causality is aligned at the end of each sequence (`causal` holds, not the selection's own). Rows past the last
        entry belong to no sequence: as queries they give 0, as keys they are not read.
    lengths, starts: `(B,)` int32: of row b only the keys starts[b] ... lengths[b] - 1 count (padding right and left). They cut what is
        seen and move nothing: causality stays aligned at the end of Nk, so that padded queries and keys stand as they stood.
    sinks: `(Hq,)` logits, one a query head, that join each softmax without a value; the lse counts them.
    low_rank_bias: a `(B or 1, Hq or 1, Nq, R)` and b `(B or 1, Hq or 1, Nk, R)` in q's dtype or float32: a_i.b_j is added to the
        logits, after the softcap. The kernels take R up to 32.
    state: an earlier result over other keys, with its lse: the result is over both.
    Gradients reach q, k, v, sinks, low_rank_bias, the log weights of extra keys, and the state.

    Returns Partial(out `(B, Hq, Nq, Dv)`, lse `(B, Hq, Nq)` or None). A row that reads nothing is 0 with lse -inf, or with its sink.
    `saccade.last_run()` says what ran.
    Raises ValueError or TypeError on shapes, dtypes or devices that don't fit, and when the named `impl` can't run the call.
    """
    q, k, v = alike(q, k, v)
    layout = check_attention_inputs(q, k, v)
    if selection is not None:
        _check_selection(selection, q, k)
        if q_positions is None and k_positions is None and cu_seqlens_q is None:
            causal = selection.causal
    if q_positions is None and k_positions is not None:
        q_positions = row_positions(q.shape[2], k.shape[2] - q.shape[2], q.device)
    elif k_positions is None and q_positions is not None:
        k_positions = row_positions(k.shape[2], 0, q.device)
    problem = Problem(
        q=q, k=k, v=v, selection=selection, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap,
        bias=bias, return_lse=return_lse or extra_keys is not None or state is not None, layout=layout, q_positions=q_positions,
        k_positions=k_positions, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, lengths=lengths, starts=starts, sinks=sinks,
        low_rank=None if low_rank_bias is None else LowRank(*low_rank_bias),
    )  # fmt: skip
    check(problem)
    if state is not None:
        check_state(problem, state)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    name, out = _run(problem, impl)
    others: list[Partial] = []
    if extra_keys is not None:
        over_extra = problem.over_extra(extra_keys)
        kernels = _kernels(over_extra, asked=False) if name == "triton" and impl == "auto" else None
        extra_name, extra = ("triton", kernels) if kernels is not None else _run(over_extra, impl)
        name = name if extra_name == name else f"{name}, extra keys: {extra_name}"
        others.append(extra)
    if state is not None:
        others.append(state)
    if others:
        out = merge(out, *others)
        out = out if return_lse else Partial(out.out, None)
    if not torch.compiler.is_compiling():
        note(LastRun(
            op="attend", impl=name, n_q=q.shape[2], n_k=k.shape[2], heads=q.shape[1], device=str(q.device),
            dtype=str(q.dtype).removeprefix("torch."), selection=selection,
        ))  # fmt: skip
    return out


def _run(problem: Problem, impl: Impl) -> tuple[str, Partial]:
    """The name of the implementation that ran and its result."""
    if impl == "reference":
        return "reference", reference.attend(problem)
    if impl == "flex":
        flex.require(problem)
        return "flex", flex.attend(problem)
    if impl == "triton":
        require_triton("attend", problem.q)
        out = _kernels(problem, asked=True)
        assert out is not None
        return "triton", out
    if problem.selection is None and (done := dense.fused(problem)) is not None:
        return done
    if impl == "auto" and runs_on(problem.q) and (kernels := _kernels(problem, asked=False)) is not None:
        return "triton", kernels
    if problem.selection is None:
        return dense.attend(problem)
    if problem.sinks is None:
        return "cpu", cpu.attend(problem)
    part = join_sinks(cpu.attend(replace(problem, sinks=None, return_lse=True)), problem.sinks)
    return "cpu", part if problem.return_lse else Partial(part.out, None)


def _kernels(problem: Problem, *, asked: bool) -> Partial | None:
    """What the Triton kernels give, None where they can't run the problem; ValueError then if they were asked for by name."""
    from saccade.ops.attend import triton

    reason = triton.refuses(problem)
    if reason is None:
        return triton.attend(problem)
    if asked:
        raise ValueError(f'attend: impl "triton" can\'t run this: {reason}; use impl "auto"')
    return None


def _check_selection(selection: Selection, q: Tensor, k: Tensor) -> None:
    if (selection.n_q, selection.n_k) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the selection is over {selection.n_q} queries and {selection.n_k} keys, "
            f"q and k have {q.shape[2]} and {k.shape[2]}: build it for these tensors"
        )
    if selection.batch not in (1, q.shape[0]) or selection.heads not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"the selection has batch {selection.batch} and {selection.heads} heads: expected batch 1 or {q.shape[0]} "
            f"and 1, {k.shape[1]} or {q.shape[1]} heads"
        )
    if selection.device != q.device:
        raise ValueError(f"the selection is on {selection.device} and q on {q.device}: build it on one device")
