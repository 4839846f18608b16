"""From a Problem to the kernels: shapes, strides, tile sizes and tensor descriptors."""

# Triton's launcher takes more arguments than the kernel names, and turns numbers into constants.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from saccade.core import Selection
from saccade.ops.attend.triton.extras import NONE, Extras, kernel_arguments, rank_sizes
from saccade.ops.attend.triton.forward import forward_kernel
from saccade.ops.gpu import ceil_div, next_power_of_two

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """rows: most query rows of a program. keys: keys of a step. gathered: single keys of a step."""

    rows: int
    keys: int
    gathered: int
    warps: int
    stages: int


def forward_config(dim: int, dtype: torch.dtype, singles: bool = False) -> Config:
    """Tile sizes for the larger of the two head dims, found on an H200 (docs/performance.md)."""
    if dtype == torch.float32:
        return Config(64, 32, 32, 4, 1) if dim <= 128 else Config(32, 32, 16, 4, 1)
    if dim <= 64:
        return Config(128, 64, 64, 4, 3)
    if dim <= 128:
        return Config(128, 64, 128, 8, 2) if singles else Config(128, 64, 64, 4, 2)
    return Config(128, 32, 32, 8, 2)


class Lists(NamedTuple):
    """A selection's lists as the kernels take them: starts `(B or 1, H, Tq, M)`, tokens `(B or 1, H, Tq or 1, M')`, counts
    `(B or 1, H, Tq)`, all int32. The kernels go by the counts."""

    starts: Tensor
    start_counts: Tensor
    tokens: Tensor
    token_counts: Tensor
    log_weight: Tensor | None
    block_q: int
    block_k: int
    aligned: bool


def lists_of(selection: Selection) -> Lists:
    """The lists of a selection, the ones with fewer heads repeated to those of the other."""
    s, heads = selection, selection.heads
    starts, start_counts, tokens, token_counts = (
        x if x.shape[1] == heads or x.shape[-1] == 0 else x.repeat_interleave(heads // x.shape[1], dim=1)
        for x in (s.starts, s.start_counts, s.tokens, s.token_counts)
    )
    weight = s.log_weight
    if weight is not None:
        weight = weight.expand(tokens.shape).contiguous()
    return Lists(
        starts.contiguous(), start_counts.contiguous(), tokens.contiguous(), token_counts.contiguous(), weight, s.block_q, s.block_k,
        s.aligned,
    )  # fmt: skip


def list_strides(lists: Lists) -> tuple[int, ...]:
    """Strides of batch, head and tile of the starts, batch and head of their counts, then the same for the tokens; 0 where shared."""
    out: list[int] = []
    for ids, counts in ((lists.starts, lists.start_counts), (lists.tokens, lists.token_counts)):
        out += [0 if ids.shape[i] == 1 else ids.stride(i) for i in (0, 1, 2)]
        out += [0 if counts.shape[i] == 1 else counts.stride(i) for i in (0, 1)]
    return tuple(out)


def unit_stride(x: Tensor) -> Tensor:
    """x with its channels next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def packed_heads(group: int, block_q: int, most: int) -> int:
    """How many query heads of a group share a program, given a list that serves them all and `most` rows."""
    return max(p for p in range(1, group + 1) if group % p == 0 and (p == 1 or p * block_q <= most))


def rows_layout(x: Tensor, width: int) -> tuple[list[int], list[int]] | None:
    """Shape and strides of x `(B, H, N, D)` as rows of one long matrix, for the copy engine; None where x can't be seen so."""
    batch, heads, n, dim = x.shape
    per_batch, per_head, per_row, per_channel = x.stride()
    if per_channel != 1 or per_row < dim or n == 0 or x.data_ptr() % 16 or (per_row * x.element_size()) % 16:
        return None
    if batch > 1 and per_batch % per_row:
        return None
    if heads > 1 and per_head % per_row and heads * per_head > per_row:
        return None
    if width != dim and per_row != dim:
        return None  # the padding channels would be those of the next head
    rows = ((batch - 1) * per_batch + (heads - 1) * per_head) // per_row + n
    cols = per_row if heads > 1 and per_head % per_row else dim
    return None if rows >= 2**31 else ([rows, cols], [per_row, 1])


def rows_descriptor(x: Tensor, keys: int, width: int) -> TensorDescriptor | None:
    """A descriptor of blocks of `keys` rows and `width` channels of x, None where there can't be one."""
    layout = rows_layout(x, width)
    return None if layout is None else TensorDescriptor(x, *layout, [keys, width])


def forward(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, bias: Tensor | None, *, causal: bool, scale: float, softcap: float,
    need_lse: bool, extras: Extras = NONE, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `(B, Hq, Nq, Dv)` and lse `(B, Hq, Nq)` float32 (empty unless need_lse). softcap 0: none. causal: by the order of rows."""
    batch, heads, n_q, dim = q.shape
    kv_heads, n_k, dim_v = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads
    out = torch.empty(batch, heads, n_q, dim_v, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, n_q) if need_lse else (0,), dtype=torch.float32, device=q.device)
    if q.numel() == 0 or n_k == 0:
        lse = lse.fill_(-torch.inf)
        return out.zero_(), lse if extras.sinks is None or not need_lse else lse.copy_(extras.sinks[:, None].expand(lse.shape))
    q, k, v = (unit_stride(x) for x in (q, k, v))
    if scale < 0:
        q, scale = -q, -scale
    if config is None and softcap == 0 and bias is None and not extras.any and _hopper_takes(q, k, v, lists, scale):
        from saccade.ops.attend.triton import hopper

        strides = (0,) * 5 if lists is None else list_strides(lists)
        hopper.forward(q, k, v, lists, strides, causal=causal, scale=scale, out=out, lse=lse)
        return out, lse
    config = config or forward_config(max(dim, dim_v), q.dtype, lists is not None and lists.starts.shape[-1] == 0)
    if extras.a is not None and config.warps == 4 and config.rows > 64:
        config = config._replace(warps=8)  # two more operands of a step need registers
    if lists is None:
        block_q, block_k, pack = config.rows, config.keys, 1
        none = q.new_empty(1, 1, 1, 0, dtype=torch.int32)
        lists, listed, list_heads = Lists(none, none, none, none, None, block_q, block_k, True), False, 1
    else:
        block_q, block_k, listed = lists.block_q, lists.block_k, True
        list_heads = max(lists.starts.shape[1], lists.tokens.shape[1])
        together = kv_heads % list_heads == 0 and not extras.per_query_head(kv_heads)
        pack = packed_heads(group if together else 1, block_q, config.rows)
    rows = min(block_q, config.rows)
    block_m = max(16, next_power_of_two(rows * pack))
    small = listed and block_k % config.keys != 0
    padded, padded_v = max(16, next_power_of_two(dim)), max(16, next_power_of_two(dim_v))
    desc_k = rows_descriptor(k, config.keys, padded)
    desc_v = rows_descriptor(v, config.keys, padded_v)
    desc_q = rows_descriptor(q, block_m, padded) if pack == 1 and rows == block_m and q.dtype != torch.float32 else None
    tma = desc_k is not None and desc_v is not None and q.dtype != torch.float32
    tiles = ceil_div(n_q, block_q)
    bias_strides = (0, 0, 0, 0)
    if bias is not None:
        bias_strides = bias.expand(batch, heads, n_q, n_k).stride()
    edge = ceil_div(rows, block_k) if causal else int(n_k % block_k != 0)
    grid = (tiles * ceil_div(block_q, rows), batch * (heads // pack))
    forward_kernel[grid](
        q, k, v, q if desc_q is None else desc_q, desc_k if tma else k, desc_v if tma else v, out, lse, q if bias is None else bias,
        lists.starts, lists.start_counts, lists.tokens, lists.token_counts, q if lists.log_weight is None else lists.log_weight,
        scale if softcap or extras.a is not None else scale * LOG2E, float(softcap), n_q, n_k,
        *kernel_arguments(extras, heads), *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *bias_strides,
        *list_strides(lists), heads, group, heads // list_heads, tiles,
        block_q=block_q, block_k=block_k, ROWS=rows, EDGE=edge,
        D=dim, DV=dim_v, BM=block_m, BN=config.keys, BT=config.gathered, BD=padded, BDV=padded_v,
        PACK=pack, CAUSAL=causal, LISTED=listed, SMALL=small, TOKENS=lists.tokens.shape[-1] > 0, WEIGHT=lists.log_weight is not None,
        HAS_CAP=softcap != 0, HAS_BIAS=bias is not None, HAS_LSE=need_lse, TMA=tma, TMA_Q=desc_q is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", STAGES=config.stages,
        EVEN=n_k % block_k == 0 and (lists.aligned or not listed), **rank_sizes(extras, q),
        num_warps=config.warps if block_m >= 64 else 4, num_stages=config.stages,
    )  # fmt: skip
    return out, lse


def _hopper_takes(q: Tensor, k: Tensor, v: Tensor, lists: Lists | None, scale: float) -> bool:
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return False
    from saccade.ops.attend.triton import hopper

    return hopper.takes(q, k, v, lists, scale)
