"""From a forward result and its gradient to the two backward kernels."""

# Triton's launcher takes more arguments than the kernel names, and turns numbers into constants.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.ops.attend.triton.backward_k import backward_k_kernel
from saccade.ops.attend.triton.backward_q import backward_q_kernel, delta_kernel
from saccade.ops.attend.triton.extras import NONE, Extras, kernel_arguments, rank_sizes
from saccade.ops.attend.triton.launch import Lists, list_strides, rows_descriptor, unit_stride
from saccade.ops.attend.triton.turned import readers
from saccade.ops.gpu import ceil_div, next_power_of_two


class Config(NamedTuple):
    """Query-major kernel: q_rows x q_keys a step; key-major: k_rows queries x k_keys. gathered: single keys of a step."""

    q_rows: int
    q_keys: int
    k_rows: int
    k_keys: int
    gathered: int
    q_warps: int
    k_warps: int
    q_stages: int
    k_stages: int


def backward_config(dim: int, dtype: torch.dtype, listed: bool) -> Config:
    """Tile sizes for the larger of the two head dims, found on an H200 (docs/performance.md)."""
    if dtype == torch.float32:
        return Config(32, 32, 32, 32, 16, 4, 4, 1, 1)
    if dim <= 128:
        return Config(64, 64, 64, 64, 32, 4, 4, 2, 2) if listed else Config(128, 64, 64, 64, 32, 8, 4, 3, 2)
    return Config(64, 32, 32, 64, 16, 8, 8, 1, 1)


def seers(extras: Extras, n_k: int, keys: int) -> Tensor | None:
    """For each tile of `keys` keys, `(B or 1, Tk, 4)` int32: query rows first ... last - 1 see a key of it, and from the second to the
    third number those that see every key of it."""
    if extras.lo is None or extras.hi is None:
        return None
    begin = torch.arange(0, n_k, keys, device=extras.lo.device, dtype=torch.int32).expand(len(extras.lo), -1).contiguous()
    last = (begin + keys).clamp(max=n_k) - 1
    # bounds never fall from row to row, so what sees a key is one run of rows
    edges = ((extras.hi, begin), (extras.hi, last), (extras.lo, begin), (extras.lo, last))
    return torch.stack([torch.searchsorted(bound, key, right=True, out_int32=True) for bound, key in edges], -1)


class Gradients(NamedTuple):
    """Of q, k, v in their dtypes; of sinks, a and b in float32, `(B, Hq, N, R)` for a and b however they are shared; else empty."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor
    a: Tensor
    b: Tensor


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, lists: Lists | None, *,
    causal: bool, scale: float, softcap: float, extras: Extras = NONE, rank_grad: bool = False, config: Config | None = None,
) -> Gradients:  # fmt: skip
    """d_lse None: nothing depends on the log-sum-exp. rank_grad: whether a and b want gradients."""
    batch, heads, n_q, dim = q.shape
    kv_heads, n_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    rank = extras.a.shape[3] if extras.a is not None and rank_grad else 0
    da, db = (torch.zeros((batch, heads, n, rank) if rank else (0,), dtype=torch.float32, device=q.device) for n in (n_q, n_k))
    if q.numel() == 0 or n_k == 0:
        d_sinks = _sink_gradient(extras.sinks, lse, torch.zeros_like(lse) if d_lse is None else -d_lse)
        return Gradients(torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), d_sinks, da, db)
    chosen, config = config, config or backward_config(max(dim, dim_v), q.dtype, lists is not None)
    if extras.a is not None:  # the bias needs registers and shared memory of its own
        config = config._replace(k_warps=8, q_stages=min(config.q_stages, 2))
    q, k, v = (unit_stride(x) for x in (q, k, v))
    d_out = d_out.contiguous()
    out = out.contiguous()
    delta = torch.empty_like(lse)
    padded_v = max(16, next_power_of_two(dim_v))
    on_hopper = softcap == 0 and not extras.any and chosen is None and _hopper_takes(q, k, v, lists)
    lse2 = torch.empty_like(lse) if on_hopper else lse
    delta_kernel[(ceil_div(lse.numel(), 64),)](
        out, d_out, lse, lse if d_lse is None else d_lse.contiguous(), delta, lse2, lse.numel(),
        DV=dim_v, BDV=padded_v, BM=64, HAS_LSE=d_lse is not None, LSE2=on_hopper,
    )  # fmt: skip
    if on_hopper:
        from saccade.ops.attend.triton import hopper_backward

        steps = (0,) * 5 if lists is None else list_strides(lists)
        turned = None if lists is None else readers(lists, n_q, n_k, causal)
        dq, dk, dv = hopper_backward.backward(q, k, v, d_out, lse2, delta, lists, steps, turned, causal=causal, scale=scale)
        return Gradients(dq, dk, dv, _sink_gradient(None, lse, delta), da, db)
    padded = max(16, next_power_of_two(dim))
    none = q.new_empty(1, 1, 1, 0, dtype=torch.int32)
    listed = lists is not None
    if lists is None:
        rows, keys = config.q_rows, config.q_keys
        lists = Lists(none, none, none, none, None, rows, keys, True)
        k_rows, k_keys, small, tiled = config.k_rows, config.k_keys, False, True
    else:
        rows, keys = min(lists.block_q, config.q_rows), min(lists.block_k, config.q_keys)
        k_rows, k_keys = min(lists.block_q, config.k_rows), min(lists.block_k, config.k_keys)
        # a tile that can't be walked in power-of-two steps of at least 16 is gathered
        fits = lists.aligned and all(
            step >= 16 and step == next_power_of_two(step) and size % step == 0
            for size, step in ((lists.block_k, keys), (lists.block_k, k_keys), (lists.block_q, k_rows))
        )
        named = lists.starts.shape[-1] > 0
        small, tiled = named and not fits, named and fits
    tokens = lists.tokens.shape[-1] > 0
    gathers = small or tokens
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    exact = torch.float32 if gathers else k.dtype
    make = torch.zeros if gathers else torch.empty
    dk, dv = make(k.shape, dtype=exact, device=q.device), make(v.shape, dtype=exact, device=q.device)
    half, precision = (True, "tf32") if q.dtype != torch.float32 else (False, "ieee")
    block_m = max(16, next_power_of_two(rows))

    def descriptors(q_rows: int, k_rows: int) -> list[TensorDescriptor | None]:
        return [
            rows_descriptor(x, size, width) if half and tiled else None
            for x, size, width in ((q, q_rows, padded), (k, k_rows, padded), (v, k_rows, padded_v), (d_out, q_rows, padded_v))
        ]

    list_heads = max(lists.starts.shape[1], lists.tokens.shape[1])
    bounds, positions, _, low_rank = kernel_arguments(extras, heads)
    sizes = {**rank_sizes(extras, q), "RANK_GRAD": rank > 0}
    grid = (ceil_div(n_q, lists.block_q) * ceil_div(lists.block_q, rows), batch * heads)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shape = {"D": dim, "DV": dim_v, "BD": padded, "BDV": padded_v, "CAUSAL": causal, "HAS_CAP": softcap != 0, "PRECISION": precision}
    ours = descriptors(block_m, keys)
    tma = ours[1] is not None and ours[2] is not None
    tma_q = not gathers and block_m == rows and ours[0] is not None and ours[3] is not None
    backward_q_kernel[grid](
        q, k, v, *(x if x is not None else q for x in ours), d_out, lse, delta, dq, dk, dv, da, db,
        lists.starts, lists.start_counts, lists.tokens, lists.token_counts, q if lists.log_weight is None else lists.log_weight,
        scale, float(softcap), n_q, n_k, bounds, positions, low_rank, *strides, *list_strides(lists), heads, heads // kv_heads,
        heads // list_heads, ceil_div(n_q, lists.block_q), block_q=lists.block_q, block_k=lists.block_k, ROWS=rows,
        BM=block_m, BN=keys if tiled else 16, BT=config.gathered, LISTED=listed, SMALL=small, TOKENS=tokens,
        WEIGHT=lists.log_weight is not None, TMA=tma, TMA_Q=tma_q, STAGES=config.q_stages, EVEN=n_k % keys == 0, **shape, **sizes,
        num_warps=config.q_warps if block_m >= 64 else 4, num_stages=config.q_stages,
    )  # fmt: skip
    if tiled:
        ids, counts = readers(lists, n_q, n_k, causal and not extras.masks) if listed else (none, none)
        ours = descriptors(k_rows, k_keys)
        tma = all(x is not None for x in ours)
        backward_k_kernel[(ceil_div(n_k, k_keys), batch * kv_heads)](
            q, k, v, *(x if x is not None else q for x in ours), d_out, lse, delta, dk, dv, db, ids, counts,
            scale, float(softcap), n_q, n_k, ids.shape[-1], bounds, seers(extras, n_k, k_keys), positions, low_rank, *strides,
            heads, heads // kv_heads, ids.shape[1], ids.shape[0],
            block_q=lists.block_q, block_k=lists.block_k if listed else k_keys, BM=k_rows, BN=k_keys, LISTED=listed, ADD=gathers, TMA=tma,
            STAGES=config.k_stages, EVEN=n_q % (lists.block_q if listed else k_rows) == 0, **shape, **sizes,
            num_warps=config.k_warps if k_keys >= 64 else 4, num_stages=config.k_stages,
        )  # fmt: skip
    return Gradients(dq, dk.to(k.dtype), dv.to(v.dtype), _sink_gradient(extras.sinks, lse, delta), da, db)


def _hopper_takes(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None) -> bool:
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    from saccade.ops.attend.triton import hopper_backward

    return hopper_backward.takes(q, k, v, lists)


def _sink_gradient(sinks: Tensor | None, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink is a key with value 0: d_sink = -sum p_sink * delta, `(Hq,)`."""
    if sinks is None:
        return lse.new_empty(0)
    share = (sinks[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(share * delta).sum((0, 2))
