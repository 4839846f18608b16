"""attend_low_bit: softmax attention whose products q.k are taken in 8 bits.

    q_i ~ s_q qhat_i,   k_j - kbar ~ s_k khat_j,   l_ij = scale * (s_q s_k qhat_i.khat_j + q_i.kbar)

qhat and khat are int8 (steps max|x| / 127) or float8 e4m3 (max|x| / 448); 32 queries share a step, and `block_k` keys. kbar is the mean
key: what all keys have in common costs no bits, and q_i.kbar, one number a row, leaves the softmax as it is (it is added where a cap or
the log-sum-exp needs it). Softmax is in float32, the product with the values in their dtype, in float16, or in float8 with a step for
each channel. The filter of spargeattn (2502.18137), `skip_below`, leaves out the exponentials, sums and value products of tiles that
can't matter. Implementations: `reference` (the oracle), `cpu` (plain torch, without a map of all pairs), `triton`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.core import Partial, Selection, check_attention_inputs
from saccade.ops.attend.low_bit import cpu, reference
from saccade.ops.attend.low_bit.problem import LowBit
from saccade.ops.attend.problem import Problem
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")

__all__ = ["IMPLEMENTATIONS", "attend_low_bit"]


def attend_low_bit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None = None,
    *,
    causal: bool = True,
    qk: Literal["int8", "fp8"] = "int8",
    pv: Literal["same", "fp16", "fp8"] = "same",
    smooth: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    block_q: int = 128,
    block_k: int = 128,
    skip_below: float | None = None,
    return_lse: bool = False,
    impl: Literal["auto", "reference", "cpu", "triton"] = "auto",
) -> Partial:
    """Attention of q `(B, Hq, Nq, D)` over k `(B, Hk, Nk, D)`, v `(B, Hk, Nk, Dv)`; Hk divides Hq. No gradients.

    selection, causal, scale, softcap: as in `attend`; a selection's tiles may have any size and start.
    qk: the numbers that q.k is computed with. pv: those of weights times values: the dtype of v; float16 (values must fit it); float8.
    smooth: take the mean key off before the keys are rounded. It is the mean of all keys, and a step serves a block of them: what a causal
    row reads is never a later key, but how earlier keys are rounded depends on later ones, and on what else is in the call.
    block_q, block_k: most query rows and the keys of one step; powers of two from 32 to 256. block_k keys share a step size.
    skip_below: lambda >= 0, in base-2 exponents. A step of the running softmax, block_q rows (fewer where the selection's query tiles
    are smaller) over block_k keys in ascending order, is skipped where every row's largest logit there lies more than lambda below the
    largest before: it would change no row's sum by more than block_k * 2^-lambda of it. None: off. A selection then has tiles of a
    multiple of block_k, aligned, and no single keys.
    impl: "triton" on CUDA tensors (no float64, D and Dv <= 256; float8 from compute capability 8.9 on); "cpu": plain torch on any device,
    where weights met by float8 values are themselves rounded only if the selection would allow skip_below; "reference".
    Returns Partial as `attend` does. Raises ValueError or TypeError on inputs that don't fit, and where gradients are asked for.
    """
    layout = check_attention_inputs(q, k, v)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("attend_low_bit gives no gradients and q, k or v wants one: call it under torch.no_grad(), or use attend")
    if selection is not None:
        causal = selection.causal
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    problem = Problem(
        q=q, k=k, v=v, selection=selection, causal=causal, scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=softcap, bias=None, return_lse=return_lse, layout=layout,
    )  # fmt: skip
    case = LowBit(
        problem=problem, qk=qk, pv=pv, smooth=smooth, block_q=block_q, block_k=block_k,
        skip_below=None if skip_below is None else float(skip_below),
    )  # fmt: skip
    case.check()
    if _on_gpu(impl, case):
        from saccade.ops.attend.low_bit import triton as kernels

        ran, result = "triton", kernels.attend(case)
    elif impl == "reference":
        ran, result = "reference", reference.attend(case)
    else:
        ran, result = "cpu", cpu.attend(case)
    if not torch.compiler.is_compiling():
        note(LastRun(
            op="attend_low_bit", impl=ran, n_q=q.shape[2], n_k=k.shape[2], heads=q.shape[1], device=str(q.device),
            dtype=str(q.dtype).removeprefix("torch."), selection=selection,
        ))  # fmt: skip
    return result


def _on_gpu(impl: str, case: LowBit) -> bool:
    """Whether the kernels run; ValueError where they were asked for and can't."""
    q = case.problem.q
    if impl != "triton" and not (impl == "auto" and runs_on(q)):
        return False
    if impl == "triton":
        require_triton("attend_low_bit", q)
    from saccade.ops.attend.low_bit import triton as kernels

    why = kernels.refuses(case)
    if why is not None and impl == "triton":
        raise ValueError(f'attend_low_bit: impl "triton" can\'t run this: {why}; use impl "auto"')
    return why is None
