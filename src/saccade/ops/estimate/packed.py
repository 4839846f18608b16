"""Scores of tokens from a few quantised channels: what a label cache of packed codes is ranked by."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.estimate.best import HALF, row_products
from saccade.ops.estimate.common import Impl, exact, note, use_triton
from saccade.ops.estimate.groups import Reduce, check_reduce, over_group, rows_of
from saccade.ops.quant import packed_bytes, unpack

WHOLE = (1, 2, 4, 8)  # bits of which no code lies across two bytes


def packed_products(
    q: Tensor, codes: Tensor, ranges: Tensor, bits: int, dim: int, *, reduce: Reduce = "none", impl: Impl = "auto"
) -> Tensor:
    """Products of q `(B, Hq, dim)` with quantised rows: float32 `(B, Hq, n)` (float64 for float64), with a reduction `(B, Hk, n)`.

        s_hj = q_h.(lowest_j + step_j code_j) = lowest_j sum_c q_hc + step_j sum_c q_hc code_jc

    codes: uint8 `(B, Hk, n, packed_bytes(dim, bits))`, as `pack` of ops.quant makes them, Hk dividing Hq. ranges: `(B, Hk, n, 2)`, the
    step and the lowest value of each row, floating point. reduce: over the query heads of a group, as in `row_products`.
    The kernel reads each row's bytes once for the group, restores nothing, and takes 1, 2, 4 and 8 bits. Raises ValueError for shapes
    that do not fit.
    """
    check_reduce("packed_products", reduce)
    width = packed_bytes(dim, bits)
    if codes.ndim != 4 or codes.shape[-1] != width or ranges.shape != (*codes.shape[:3], 2) or not ranges.is_floating_point():
        raise ValueError(
            f"packed_products: codes {tuple(codes.shape)} and ranges {ranges.dtype} {tuple(ranges.shape)} do not hold {dim} codes of "
            f"{bits} bits: expected (B, heads, n, {width}), and floating-point (B, heads, n, 2)"
        )
    batch, kv_heads, n, _ = codes.shape
    if q.ndim != 3 or q.shape[0] != batch or q.shape[2] != dim or q.shape[1] % kv_heads:
        raise ValueError(f"packed_products: queries {tuple(q.shape)} do not fit codes {tuple(codes.shape)}: expected (B, heads, {dim})")
    fast = use_triton("packed_products", impl, codes, _unsupported(q, ranges, bits))
    if fast and n:
        from saccade.ops.estimate.triton.packed_products import packed

        found = packed(q, codes, ranges, bits, reduce)
    else:
        wanted = exact(q)
        products = row_products(q, unpack(codes, bits, dim), impl="reference").unflatten(1, (kv_heads, -1))
        step, lowest = ranges.to(wanted).unsqueeze(2).unbind(-1)
        sums = q.to(wanted).sum(-1, keepdim=True).unflatten(1, (kv_heads, -1))
        scores = over_group(products.mul_(step).addcmul_(sums, lowest), reduce)
        found = scores.reshape(batch, rows_of(q.shape[1], kv_heads, reduce), n)
    note("packed_products", "triton" if fast else "reference", codes, 1, n)
    return found


def _unsupported(q: Tensor, ranges: Tensor, bits: int) -> str | None:
    """Why the kernel can't take these, or None."""
    if bits not in WHOLE:
        return f"the kernel takes {', '.join(map(str, WHOLE))} bits, not {bits}"
    for name, x in (("queries", q), ("ranges", ranges)):
        if x.dtype not in (*HALF, torch.float32):
            return f"the kernel takes float32, float16 and bfloat16 {name}, not {x.dtype}"
    return None
