"""From a low-bit call to the kernels: codes made, tile sizes chosen, tensors described."""

# Triton's launcher takes more arguments than the kernel names, and turns numbers into constants.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.ops.attend.low_bit.codes import QUERY_ROWS
from saccade.ops.attend.low_bit.triton.forward import low_bit_kernel
from saccade.ops.attend.low_bit.triton.quantise import quantise_rows, quantise_values
from saccade.ops.attend.triton.launch import Lists, list_strides, rows_descriptor, unit_stride
from saccade.ops.gpu import ceil_div, next_power_of_two

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """gathered: single keys of a step. warps, stages: of a program."""

    gathered: int
    warps: int
    stages: int


def config(dim: int, block_q: int, block_k: int, pv_bytes: int) -> Config:
    """For the larger of the two head dims and the bytes of a value: what keeps the sums of a step in registers."""
    if pv_bytes == 4:
        return Config(32, 8 if block_q * dim > 8192 else 4, 1)
    wide = block_q * (dim + block_k) > 24576 or (pv_bytes == 1 and dim > 64)
    return Config(64 if dim <= 128 else 32, 8 if wide else 4, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, *, causal: bool, qk: str, pv: str, smooth: bool, scale: float, softcap: float,
    block_q: int, block_k: int, skip_below: float | None, need_lse: bool, chosen: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `(B, Hq, Nq, Dv)` and lse `(B, Hq, Nq)` float32 (empty unless need_lse). softcap 0: none."""
    batch, heads, n_q, dim = q.shape
    kv_heads, n_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    out = torch.empty(batch, heads, n_q, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n_q) if need_lse else (0,), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or n_k == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    group = heads // kv_heads
    has_dot = smooth and (need_lse or softcap != 0)
    mean = k.mean(2, dtype=torch.float32) if smooth else None
    q_codes, q_steps, dots = quantise_rows(
        q, mean if has_dot else None, QUERY_ROWS, qk, group=group, dot_scale=scale if has_dot else None
    )  # fmt: skip
    # the logit's scale goes with the queries' steps, its sign with their codes
    q_steps = q_steps * (abs(scale) if softcap else abs(scale) * LOG2E)
    if scale < 0:
        q_codes = _negated(q_codes)
    k_codes, k_steps, _ = quantise_rows(k, mean, block_k, qk)
    if chosen is None and softcap == 0 and skip_below is None and pv != "fp8" and _hopper_takes(q, v, lists, block_k, k_codes.shape[3], pv):
        from saccade.ops.attend.triton import hopper

        codes = hopper.Codes(q_codes, k_codes, q_steps, k_steps, QUERY_ROWS, block_k)
        strides = (0,) * 5 if lists is None else list_strides(lists)
        hopper.forward(q, k, v, lists, strides, causal=causal, scale=scale, out=out, lse=lse, codes=codes)
        return out, lse.add_(dots) if has_dot else lse
    float8 = pv == "fp8"
    v_steps = k_steps
    if float8:
        v, v_steps = quantise_values(v, block_k)
        v_strides = (v.stride(0), v.stride(1), 1, v.stride(2))
    else:
        v = v.to(torch.float16) if pv == "fp16" else v
        v_strides = (*v.stride()[:3], 1)
    padded, padded_v = k_codes.shape[3], v.shape[2] if float8 else max(16, next_power_of_two(dim_v))
    if float8:  # keys lie next to each other: tiles that start anywhere are not for the copy engine
        desc_v = _rows(v, [padded_v, block_k]) if lists is None or lists.aligned else None
    else:
        desc_v = None if v.dtype == torch.float32 else rows_descriptor(v, block_k, padded_v)

    listed = lists is not None
    if lists is None:
        none = q.new_empty(1, 1, 1, 0, dtype=torch.int32)
        lists, tile_q, tile_k, list_heads = Lists(none, none, none, none, None, block_q, block_k, True), block_q, block_k, 1
    else:
        tile_q, tile_k, list_heads = lists.block_q, lists.block_k, max(lists.starts.shape[1], lists.tokens.shape[1])
    rows = min(tile_q, block_q)
    block_m = max(16, next_power_of_two(rows))
    chosen = chosen or config(max(dim, dim_v), block_m, block_k, v.element_size())
    tiles = ceil_div(n_q, tile_q)
    low_bit_kernel[(tiles * ceil_div(tile_q, rows), batch * heads)](
        _rows(q_codes, [block_m, padded]), _rows(k_codes, [block_k, padded]), v if desc_v is None else desc_v, k_codes, v,
        q_steps, k_steps, v_steps, dots, out, lse, lists.starts, lists.start_counts, lists.tokens, lists.token_counts,
        q_steps if lists.log_weight is None else lists.log_weight, float(softcap or 1.0),
        float("inf") if skip_below is None else skip_below, n_q, n_k, q_codes.shape[2], k_codes.shape[2], *v_strides,
        *list_strides(lists), heads, group, heads // list_heads, tiles,
        block_q=tile_q, block_k=tile_k, ROWS=rows, QUERY_ROWS=QUERY_ROWS, DV=dim_v, BM=block_m, BN=block_k, BT=chosen.gathered, BD=padded,
        BDV=padded_v, CAUSAL=causal, LISTED=listed, SMALL=listed and tile_k % block_k != 0, TOKENS=lists.tokens.shape[-1] > 0,
        WEIGHT=lists.log_weight is not None, ALIGNED=lists.aligned, EVEN=n_k % block_k == 0 and lists.aligned,
        HAS_CAP=softcap != 0, HAS_DOT=has_dot, HAS_LSE=need_lse, SKIP=skip_below is not None, FLOAT8=float8, TMA=desc_v is not None,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32", STAGES=chosen.stages,
        num_warps=chosen.warps if block_m >= 64 else 4, num_stages=chosen.stages,
    )  # fmt: skip
    return out, lse


def _hopper_takes(q: Tensor, v: Tensor, lists: Lists | None, block_k: int, width: int, pv: str) -> bool:
    """Whether the kernel made for Hopper runs codes of `width` columns with these values."""
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    if v.dtype != q.dtype or (pv == "fp16" and v.dtype != torch.float16):
        return False
    from saccade.ops.attend.triton import hopper

    return hopper.takes_codes(v, lists, block_k, width) and q.shape[-1] == width


def _rows(x: Tensor, block: list[int]) -> TensorDescriptor:
    """A contiguous tensor as rows of one matrix, read in blocks."""
    return TensorDescriptor(x, [x.numel() // x.shape[-1], x.shape[-1]], [x.shape[-1], 1], block)


def _negated(codes: Tensor) -> Tensor:
    return -codes if codes.dtype == torch.int8 else (codes.view(torch.uint8) ^ 128).view(codes.dtype)
