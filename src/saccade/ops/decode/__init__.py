"""decode: 1 to 16 queries against a long cache.

The cache is a rectangle `(B, Hk, n, D)`, or ragged: keys `(total, D)` of all (batch, head) pairs one after another
with `offsets`. Queries see every key of it (causality among new tokens is the caller's: they are appended one at a
time or handled by `attend`); a Selection restricts them. The result carries its log-sum-exp on request, so that
segments of a cache merge exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from saccade.core import Partial, Selection, check_attention_inputs
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import cpu, reference
from saccade.ops.decode.ragged import by_head
from saccade.ops.record import LastRun, note

Impl = Literal["auto", "reference", "cpu"]
IMPLEMENTATIONS = ("auto", "reference", "cpu")

__all__ = ["IMPLEMENTATIONS", "decode"]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None = None,
    *,
    offsets: Sequence[int] | None = None,
    kv_heads: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Partial:
    """Attention of q `(B, Hq, m, D)`, m <= 16, over a cache.

    k `(B, Hk, n, D)`, v `(B, Hk, n, Dv)`; or, with `offsets` (B * kv_heads + 1 row numbers), k `(total, D)`,
    v `(total, Dv)`.
    selection: n_q = m, n_k = n, not for ragged caches. scale: default D ** -0.5. softcap as in `attend`.
    Returns Partial(out `(B, Hq, m, Dv)`, lse `(B, Hq, m)` or None); a head without keys gives 0 and -inf.
    Raises ValueError or TypeError on inputs that don't fit.
    """
    if q.ndim != 4 or q.shape[2] > 16:
        raise ValueError(
            f"q has shape {tuple(q.shape)}: decode takes (B, Hq, m, D) with at most 16 queries; use attend for more"
        )
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)
    ran = reference if impl == "reference" else cpu
    if offsets is not None:
        _check_ragged(q, k, v, offsets, kv_heads, selection)
        result = by_head(ran.rectangle, q, k, v, offsets, kv_heads or 1, factor, softcap)
        n_k = max((b - a for a, b in pairwise(offsets)), default=0)
    else:
        layout = check_attention_inputs(q, k, v)
        if selection is not None:
            _check_selection(selection, q, k)
        problem = Problem(
            q=q, k=k, v=v, selection=selection, causal=False, scale=factor, softcap=softcap, bias=None,
            return_lse=return_lse, layout=layout,
        )  # fmt: skip
        problem.check()
        result = ran.rectangle(problem)
        n_k = k.shape[2]
    note(LastRun(
        op="decode", impl="reference" if impl == "reference" else "cpu", n_q=q.shape[2], n_k=n_k, heads=q.shape[1],
        device=str(q.device), dtype=str(q.dtype).removeprefix("torch."), selection=selection,
    ))  # fmt: skip
    return result if return_lse else Partial(result.out, None)


def _check_selection(selection: Selection, q: Tensor, k: Tensor) -> None:
    if (selection.n_q, selection.n_k) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"the selection is over {selection.n_q} queries and {selection.n_k} keys, "
            f"q and the cache have {q.shape[2]} and {k.shape[2]}: build it for these tensors"
        )
    if selection.batch not in (1, q.shape[0]) or selection.heads not in (1, k.shape[1], q.shape[1]):
        raise ValueError(
            f"the selection has batch {selection.batch} and {selection.heads} heads, not batch 1 or {q.shape[0]} "
            f"and 1, {k.shape[1]} or {q.shape[1]} heads"
        )
    if selection.device != q.device:
        raise ValueError(f"the selection is on {selection.device} and q on {q.device}: build it on one device")


def _check_ragged(
    q: Tensor, k: Tensor, v: Tensor, offsets: Sequence[int], kv_heads: int | None, selection: Selection | None
) -> None:
    if kv_heads is None or kv_heads < 1 or q.shape[1] % kv_heads:
        raise ValueError(f"a ragged cache needs kv_heads dividing the {q.shape[1]} query heads, not {kv_heads}")
    if selection is not None:
        raise ValueError("a selection over a ragged cache is not supported: select before packing")
    if k.ndim != 2 or v.ndim != 2 or k.shape[0] != v.shape[0]:
        raise ValueError(
            f"a ragged cache has k (total, D) and v (total, Dv), not {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not (q.dtype == k.dtype == v.dtype) or not torch.is_floating_point(q):
        raise TypeError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: convert them to one floating-point dtype"
        )
    descends = any(b < a for a, b in pairwise(offsets))
    if len(offsets) != q.shape[0] * kv_heads + 1 or offsets[-1] != k.shape[0] or descends:
        raise ValueError(
            f"offsets must be {q.shape[0] * kv_heads + 1} ascending row numbers ending at {k.shape[0]}, "
            f"not {len(offsets)} ending at {offsets[-1] if len(offsets) else None}"
        )
