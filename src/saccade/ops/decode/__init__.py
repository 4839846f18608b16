"""decode: 1 to 16 queries against a long cache.

The cache is a rectangle `(B, Hk, n, D)`; or ragged: keys `(total, D)` of all (batch, head) pairs one after another with `offsets`;
or paged: keys `(P, page, Hk, D)` with `block_table (B, pages)`, token t of row b at slot `t % page` of page `block_table[b, t // page]`.
`lengths` says how many keys of each row count. A Selection restricts what is read. The result carries its log-sum-exp on
request, so that segments of a cache merge exactly. `decode_quantised` reads a segment held in few bits (`Packed`), `decode_beside` a
token and those just before it, whose number only the device knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from saccade.core import HeadLayout, Partial, Selection, check_attention_inputs
from saccade.ops.attend.problem import Problem
from saccade.ops.decode import cpu, reference
from saccade.ops.decode.beside import decode_beside
from saccade.ops.decode.check import check_lengths, check_paged, check_ragged, check_selection
from saccade.ops.decode.low_rank import decode_low_rank
from saccade.ops.decode.packed import Packed
from saccade.ops.decode.quantised import decode_quantised
from saccade.ops.decode.ragged import by_head, by_row
from saccade.ops.gpu import require_triton, runs_on
from saccade.ops.record import LastRun, note

Impl = Literal["auto", "reference", "cpu", "triton"]
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")

__all__ = ["IMPLEMENTATIONS", "Packed", "decode", "decode_beside", "decode_low_rank", "decode_quantised"]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None = None,
    *,
    offsets: Sequence[int] | Tensor | None = None,
    kv_heads: int | None = None,
    block_table: Tensor | None = None,
    lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Partial:
    """Attention of q `(B, Hq, m, D)`, m <= 16, over a cache.

    k `(B, Hk, n, D)`, v `(B, Hk, n, Dv)`, with any strides; or, with `offsets` (B * kv_heads + 1 row numbers, best as a tensor on
    the device), k `(total, D)`, v `(total, Dv)`; or, with `block_table (B, pages)` int32, k `(P, page, Hk, D)`,
    v `(P, page, Hk, Dv)` (a cache of `(P, Hk, page, D)` goes in as `k.transpose(1, 2)`).
    lengths: `(B,)` int32, keys of each row that count, the first ones (default all; at most n, or pages * page).
    selection: n_q = m and n_k = n (or pages * page), not for ragged caches; its `causal` counts.
    causal: the m queries are the last m tokens of the cache, and query i does not see the m - 1 - i keys after its own.
    scale: default D ** -0.5. softcap as in `attend`.
    impl: "triton" on CUDA tensors (no gradients, no float64, D and Dv <= 256), "cpu" plain torch on any device, "reference".
    Returns Partial(out `(B, Hq, m, Dv)`, lse `(B, Hq, m)` or None); a row without keys gives 0 and -inf.
    Raises ValueError or TypeError on inputs that don't fit.
    """
    if q.ndim != 4 or q.shape[2] > 16:
        raise ValueError(f"q has shape {tuple(q.shape)}: decode takes (B, Hq, m, D) with at most 16 queries; use attend for more")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl {impl!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap {softcap} must be positive, or None for no cap")
    layout = None
    if offsets is not None:
        check_ragged(q, k, v, offsets, kv_heads, any(x is not None for x in (selection, lengths, block_table)))
        heads, n_k = kv_heads or 1, -1
    elif block_table is not None:
        check_paged(q, k, v, block_table)
        heads, n_k = k.shape[2], block_table.shape[1] * k.shape[1]
    else:
        layout = check_attention_inputs(q, k, v)
        heads, n_k = layout.kv_heads, k.shape[2]
    if lengths is not None:
        check_lengths(q, lengths)
    if selection is not None:
        check_selection(selection, q, heads, n_k)
        if causal and not selection.causal:
            raise ValueError("causal=True with a selection that is not causal: build the selection with causal=True")
    factor = float(q.shape[-1] ** -0.5 if scale is None else scale)

    if _on_gpu(impl, q, k, v):
        from saccade.ops.decode import triton as kernels

        if offsets is not None and not isinstance(offsets, Tensor):
            offsets = torch.tensor(offsets, dtype=torch.int64, device=q.device)
        out, lse = kernels.attend(
            q, k, v, selection, lengths=lengths, offsets=offsets, block_table=block_table, kv_heads=heads, scale=factor,
            softcap=softcap, causal=causal, return_lse=return_lse,
        )  # fmt: skip
        result, ran, n_k = Partial(out, lse if return_lse else None), "triton", n_k if n_k >= 0 else k.shape[0]
    else:
        ran = "reference" if impl == "reference" else "cpu"
        rectangle = (reference if impl == "reference" else cpu).rectangle
        if offsets is not None:
            ends: list[int] = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
            n_k = max((b - a for a, b in pairwise(ends)), default=0)
            result = by_head(rectangle, q, k, v, ends, heads, factor, softcap, causal)
        else:
            layout = layout or HeadLayout(query_heads=q.shape[1], kv_heads=heads, head_dim=q.shape[3], value_dim=v.shape[3])
            problem = Problem(
                q=q, k=k, v=v, selection=selection, causal=causal and selection is None, scale=factor, softcap=softcap, bias=None,
                return_lse=return_lse, layout=layout,
            )  # fmt: skip
            if lengths is None and block_table is None:
                result = rectangle(problem)
            else:
                own = [n_k] * q.shape[0] if lengths is None else lengths.clamp(0, n_k).tolist()
                result = by_row(rectangle, problem, own, block_table)
    if not torch.compiler.is_compiling():
        note(LastRun(
            op="decode", impl=ran, n_q=q.shape[2], n_k=n_k, heads=q.shape[1], device=str(q.device),
            dtype=str(q.dtype).removeprefix("torch."), selection=selection,
        ))  # fmt: skip
    return result if return_lse else Partial(result.out, None)


def _on_gpu(impl: Impl, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels run; ValueError where they were asked for and can't."""
    if impl != "triton" and not (impl == "auto" and q.is_cuda and runs_on(q)):
        return False
    if impl == "triton":
        require_triton("decode", q)
    from saccade.ops.decode.triton import unsupported

    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    why = unsupported(q, v, needs_grad)
    if why and impl == "triton":
        raise ValueError(f'decode: impl "triton" can\'t run here: {why}; use impl "auto"')
    return why is None
