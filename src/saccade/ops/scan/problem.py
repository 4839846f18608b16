"""One scan call, checked: what `scan` hands to the implementations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Gate = Literal["none", "head", "token", "channel"]


class ScanState(NamedTuple):
    """The state of a scan with `normalise="sum"`: s `(B, H, D, Dv)` the decayed sum of k v^T, z `(B, H, D)` the decayed sum of k."""

    s: Tensor
    z: Tensor


State = Tensor | ScanState


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a scan computes and keeps its state: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class Problem:
    """q `(B, Hq, N, D)`, k `(B, Hk, N, D)`, v `(B, Hv, N, Dv)`; `heads` H is the largest head count, the others divide it.

    log_decay: None, `(H,)`, `(B, H, N)` or `(B, H, N, D)`. beta: None or `(B, H, N)`. state: None or `(S, H, D, Dv)` with S = B,
    or the number of sequences under `cu_seqlens`. wide_out: the output is wanted in float32, as it is divided afterwards.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    scale: float
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    wide_out: bool = False

    @property
    def gate(self) -> Gate:
        if self.log_decay is None:
            return "none"
        gates: dict[int, Gate] = {1: "head", 3: "token", 4: "channel"}
        return gates[self.log_decay.ndim]

    @property
    def sequences(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        return self.sequences, self.heads, self.q.shape[-1], self.v.shape[-1]

    def widened(self) -> Problem:
        """All tensors in the dtype of computation, every one with H heads, and a state: what plain torch code works on."""
        dtype = wide(self.q.dtype)
        b, n = self.q.shape[0], self.q.shape[2]
        g = self.log_decay
        if g is not None:
            g = g.to(dtype)
            g = g[None, :, None].expand(b, -1, n) if g.ndim == 1 else g
        state = self.q.new_zeros(self.state_shape, dtype=dtype) if self.state is None else self.state.to(dtype)
        return replace(
            self, q=self._all_heads(self.q, dtype), k=self._all_heads(self.k, dtype), v=self._all_heads(self.v, dtype), log_decay=g,
            beta=None if self.beta is None else self.beta.to(dtype), state=state,
        )  # fmt: skip

    def _all_heads(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        repeats = self.heads // x.shape[1]
        return x.to(dtype) if repeats == 1 else x.to(dtype).repeat_interleave(repeats, dim=1)

    def tokens(self, start: int, end: int) -> Problem:
        """The part that is tokens [start, end)."""
        g = self.log_decay
        return replace(
            self, q=self.q[:, :, start:end], k=self.k[:, :, start:end], v=self.v[:, :, start:end],
            log_decay=g if g is None or g.ndim == 1 else g[:, :, start:end],
            beta=None if self.beta is None else self.beta[:, :, start:end],
        )  # fmt: skip

    def sequence(self, index: int, start: int, end: int) -> Problem:
        """The part of a packed problem that is one sequence, tokens [start, end): a problem with batch 1."""
        state = None if self.state is None else self.state[index : index + 1]
        return replace(self.tokens(start, end), cu_seqlens=None, state=state)


def check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, initial_state: State | None, scale: float | None,
    normalise: str | None, cu_seqlens: Tensor | None,
) -> Problem:  # fmt: skip
    """The Problem of a call. With normalise "sum", v has a column of ones after its last and the state has z there, so that the last
    column of the output is the denominator. Raises ValueError or TypeError with one sentence."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor (B, H, N, D), not {getattr(x, 'dtype', type(x).__name__)}")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: expected (B, H, N, D)")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one dtype")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[2] == k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: expected (B, H, N, D), (B, H, N, D), (B, H, N, Dv)"
        )
    b, n, d, dv = q.shape[0], q.shape[2], q.shape[3], v.shape[3]
    heads = max(q.shape[1], k.shape[1], v.shape[1])
    if min(b, n, d, dv) < 1 or any(x.shape[1] < 1 or heads % x.shape[1] for x in (q, k, v)):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}: no axis may be empty and the head counts must "
            "divide the largest of them"
        )
    if log_decay is not None:
        _check_side("log_decay", log_decay, q, [(heads,), (b, heads, n), (b, heads, n, d)])
    if beta is not None:
        _check_side("beta", beta, q, [(b, heads, n)])
    if normalise not in (None, "sum"):
        raise ValueError(f'normalise={normalise!r} is not known: give None or "sum"')
    if normalise and beta is not None:
        raise ValueError('normalise="sum" with beta has no meaning: the delta rule has no sum of keys to divide by; leave one out')
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
            raise TypeError("cu_seqlens must be a one-dimensional int32 or int64 tensor: 0, the end of each sequence, the last N")
        if b != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.device != q.device:
            raise ValueError(
                f"cu_seqlens packs sequences along N: batch 1, at least 2 entries, on the device of q; not batch {b} with "
                f"{cu_seqlens.shape[0]} entries on {cu_seqlens.device}"
            )
        if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():  # no look at values on a GPU: it would wait for the device
            ends = cu_seqlens.tolist()
            if ends[0] != 0 or ends[-1] != n or any(y < x for x, y in pairwise(ends)):
                raise ValueError(f"cu_seqlens must ascend from 0 to N = {n}, not {ends[:3]} ... {ends[-1]}")
    problem = Problem(
        q=q, k=k, v=v, heads=heads, scale=float(d**-0.5 if scale is None else scale), log_decay=log_decay, beta=beta, cu_seqlens=cu_seqlens
    )
    state = _check_state(initial_state, problem, normalise)
    if normalise:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    return replace(problem, v=v, state=state, wide_out=normalise is not None)


def _check_side(name: str, x: Tensor, q: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {getattr(x, 'dtype', type(x).__name__)}")
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {' or '.join(map(str, shapes))}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} and q on {q.device}: move them to one device")


def _check_state(state: State | None, problem: Problem, normalise: str | None) -> Tensor | None:
    if state is None:
        return None
    want = problem.state_shape
    if normalise:
        if not isinstance(state, ScanState) or tuple(state.s.shape) != want or tuple(state.z.shape) != want[:3]:
            raise ValueError(f'normalise="sum" takes initial_state=ScanState(s {want}, z {want[:3]}): pass the state a scan returned')
        return torch.cat([state.s, state.z[..., None].to(state.s.dtype)], dim=-1)
    if not isinstance(state, Tensor) or not state.is_floating_point() or tuple(state.shape) != want:
        raise ValueError(f"initial_state is {tuple(getattr(state, 'shape', ()))}: expected a floating-point tensor {want}")
    if state.device != problem.q.device:
        raise ValueError(f"initial_state is on {state.device} and q on {problem.q.device}: move them to one device")
    return state


def split(out: Tensor, state: Tensor, normalise: str | None) -> tuple[Tensor, State]:
    """Undo the column of ones: divide by the last column (0 where it is 0) and take z out of the state."""
    if not normalise:
        return out, state
    total = out[..., -1:]
    nothing = total == 0
    divided = (out[..., :-1] / total.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)
    return divided, ScanState(state[..., :-1].contiguous(), state[..., -1].contiguous())
