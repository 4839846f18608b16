"""attend: softmax attention over a Selection.

    out_i = sum_j p_ij v_j,   p_ij = exp(l_ij) / sum_j' exp(l_ij'),   l_ij = cap(scale * q_i.k_j) + bias_ij + log_weight_j

over the keys j that query i reads. Implementations: `reference` (dense mask, differentiable, any dtype: the oracle), `cpu` (gathers
the listed keys and touches no others; plain torch, made for CPUs, runs on any device), `triton` (kernels for GPUs, differentiable),
`flex` (torch FlexAttention, compiled). `auto` takes the kernels on a GPU and `cpu` elsewhere; without a selection, plain dense
attention goes to torch's scaled_dot_product_attention. `saccade.last_run()` says which it was.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from saccade.core import Partial, Selection, check_attention_inputs, merge
from saccade.ops.attend import cpu, dense, flex, reference
from saccade.ops.attend.problem import ExtraKeys, Problem
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note

Impl = Literal["auto", "reference", "cpu", "triton", "flex"]
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "flex")

__all__ = ["IMPLEMENTATIONS", "ExtraKeys", "Impl", "attend"]


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
) -> Partial:
    """Attention of q `(B, Hq, Nq, D)` over k `(B, Hk, Nk, D)`, v `(B, Hk, Nk, Dv)`; Hk divides Hq.

    selection: the keys each query reads; its own `causal` holds. None: every visible key.
    causal: queries are the last Nq positions of Nk and see the keys up to their own. scale: default D ** -0.5.
    softcap: `cap * tanh(logit / cap)` before the bias. bias: added to the logits, broadcastable to `(B, Hq, Nq, Nk)`.
    extra_keys: keys outside the sequence that every query reads inside the same softmax.
    return_lse: also give the log-sum-exp, which `merge` needs (dense attention is a little slower with it).

    Returns Partial(out `(B, Hq, Nq, Dv)`, lse `(B, Hq, Nq)` or None). `saccade.last_run()` says what ran.
    Raises ValueError or TypeError on shapes, dtypes or devices that don't fit, and when the named `impl` can't run the call.
    """
    layout = check_attention_inputs(q, k, v)
    if selection is not None:
        _check_selection(selection, q, k)
        causal = selection.causal
    problem = Problem(
        q=q, k=k, v=v, selection=selection, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap, bias=bias, return_lse=return_lse or extra_keys is not None, layout=layout,
    )  # fmt: skip
    problem.check()
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        name, out = "reference", reference.attend(problem)
    elif impl == "flex":
        flex.require(problem)
        name, out = "flex", flex.attend(problem)
    elif impl == "triton":
        require_triton("attend", q)
        out = _kernels(problem, asked=True)
        assert out is not None
        name = "triton"
    elif selection is None:
        name, out = dense.attend(problem)
    elif impl == "auto" and runs_on(q) and (kernels := _kernels(problem, asked=False)) is not None:
        name, out = "triton", kernels
    else:
        name, out = "cpu", cpu.attend(problem)
    if extra_keys is not None:
        out = merge(out, reference.attend(problem.over_extra(extra_keys)))
        out = out if return_lse else Partial(out.out, None)
    note(LastRun(
        op="attend", impl=name, n_q=q.shape[2], n_k=k.shape[2], heads=q.shape[1], device=str(q.device),
        dtype=str(q.dtype).removeprefix("torch."), selection=selection,
    ))  # fmt: skip
    return out


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
