"""scan: gated linear recurrences, from a running sum to the gated delta rule.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T                                              without beta
    S'  = diag(exp g_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T              with beta (the delta rule)
    out_t = scale * S_t^T q_t

| log_decay          | without beta                               | with beta                         |
|--------------------|--------------------------------------------|-----------------------------------|
| None               | causal linear attention                    | DeltaNet                          |
| `(H,)`             | lightning attention, RetNet, TransNormer   | delta rule with a constant decay  |
| `(B, H, N)`        | scalar gates (simple GLA, Mamba-2)         | gated DeltaNet                    |
| `(B, H, N, D)`     | gated linear attention (GLA), LightNet     | Kimi delta attention (KDA)        |

Implementations: `reference` (token by token: the oracle), `chunked` (plain torch, any device: the CPU path), `triton` (GPU) and
`step` (one token). All are differentiable. Sources: lightning-attention-2, deltanet, kimi-linear.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from saccade.ops.autocast import alike
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note
from saccade.ops.scan import chunked, reference, step
from saccade.ops.scan.problem import Problem, ScanState, State, check, split

Impl = Literal["auto", "reference", "chunked", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "chunked", "triton")

__all__ = ["IMPLEMENTATIONS", "Impl", "ScanState", "State", "scan", "scan_step"]


def scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: State | None = None,
    scale: float | None = None,
    normalise: Literal["sum"] | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
    return_state: bool = True,
) -> tuple[Tensor, State | None]:
    """The recurrence above over q, k `(B, H, N, D)` and v `(B, H, N, Dv)`; causal, token t reads itself.

    Heads: H is the largest head count of the three; the other counts divide it and their heads are shared by equal groups.
    log_decay: natural logarithms, at most 0 (not checked): None, `(H,)`, `(B, H, N)` or `(B, H, N, D)`; any floating dtype, float32 is
    best; -inf forgets all that was.
    beta: `(B, H, N)`, the write strength of the delta rule; keys of length 1 and beta in [0, 2] keep it stable.
    initial_state: what a call before returned. scale: default D ** -0.5; 1.0 for methods without one (lightning attention).
    normalise: "sum" divides the output by q_t . z_t, z the decayed sum of the keys (0 where that is 0); not with beta.
    cu_seqlens: `(S + 1,)` int32 or int64, `0 ... N`: S sequences packed along N (batch 1), each with a state of its own.
    impl: "auto" takes Triton for CUDA tensors and "chunked" otherwise; `saccade.last_run()` says what ran.

    Returns (out `(B, H, N, Dv)` in the dtype of q, state). The state is float32 (float64 for float64): a tensor `(B, H, D, Dv)`, with
    normalise ScanState(s, z `(B, H, D)`); B is S under cu_seqlens; None unless return_state.
    Raises ValueError or TypeError on shapes, dtypes or devices that don't fit, and when the named `impl` can't run the call.
    """
    q, k, v = alike(q, k, v)
    problem = check(q, k, v, log_decay, beta, initial_state, scale, normalise, cu_seqlens)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    name, (out, state) = _run(problem, impl)
    out, final = split(out, state, normalise)
    if not torch.compiler.is_compiling():
        _note(name, problem)
    return out.to(q.dtype), final if return_state else None


def scan_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: State | None,
    *,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    normalise: Literal["sum"] | None = None,
) -> tuple[Tensor, State]:
    """One token of `scan`: q, k `(B, H, D)`, v `(B, H, Dv)`, log_decay None, `(H,)`, `(B, H)` or `(B, H, D)`, beta None or `(B, H)`.

    state: what `scan` or a step before returned, or None at the start.
    Returns (out `(B, H, Dv)`, the new state); the given one is not changed. Raises as `scan` does.
    """
    q, k, v = alike(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(f"{name} has shape {tuple(getattr(x, 'shape', ()))}: a step takes one token, (B, H, D)")
    g = log_decay if log_decay is None or log_decay.ndim == 1 else log_decay.unsqueeze(2)
    b = beta if beta is None else beta.unsqueeze(2)
    problem = check(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), g, b, state, scale, normalise, None)
    out, new = split(*step.scan(problem), normalise)
    if not torch.compiler.is_compiling():
        _note("step", problem)
    return out.squeeze(2).to(q.dtype), new


def _run(problem: Problem, impl: str) -> tuple[str, tuple[Tensor, Tensor]]:
    if impl == "reference":
        return "reference", reference.scan(problem)
    if impl == "triton":
        require_triton("scan", problem.q)
    if impl == "triton" or (impl == "auto" and runs_on(problem.q)):
        if impl == "auto" and problem.q.shape[2] == 1 and problem.cu_seqlens is None:
            return "step", step.scan(problem)
        from saccade.ops.scan import triton as kernels

        why_not = kernels.refusal(problem)
        if why_not is None:
            return kernels.scan(problem)
        if impl == "triton":
            raise ValueError(why_not)
    if impl == "auto" and problem.q.shape[2] == 1 and problem.cu_seqlens is None:
        return "step", step.scan(problem)
    return "chunked", chunked.scan(problem)


def _note(name: str, problem: Problem) -> None:
    n = problem.q.shape[2]
    note(LastRun(
        op="scan", impl=name, n_q=n, n_k=n, heads=problem.heads, device=str(problem.q.device),
        dtype=str(problem.q.dtype).removeprefix("torch."),
    ))  # fmt: skip
