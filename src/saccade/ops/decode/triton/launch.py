"""From tensors to kernels: results allocated, splits chosen, parts combined. No host synchronisation anywhere."""
# pyright: reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops.decode.triton.listed import listed
from saccade.ops.decode.triton.plan import Config, Shape, dense_config, listed_config, splits
from saccade.ops.decode.triton.stream import stream
from saccade.ops.decode.triton.tile import combine
from saccade.ops.gpu import next_power_of_two


class Result:
    """The tensors that kernels write: the result itself, and parts of it where the keys are split."""

    def __init__(self, q: Tensor, value_dim: int, parts: int, want_lse: bool) -> None:
        self.rows = q.shape[0] * q.shape[1] * q.shape[2]
        self.value_dim, self.parts, self.want_lse = value_dim, parts, want_lse
        self.out = torch.empty((*q.shape[:3], value_dim), dtype=q.dtype, device=q.device)
        self.lse = torch.empty(q.shape[:3] if want_lse else (0,), dtype=torch.float32, device=q.device)
        if parts > 1:
            self.part = torch.empty((self.rows, parts, value_dim), dtype=torch.float32, device=q.device)
            self.part_lse = torch.empty((self.rows, parts), dtype=torch.float32, device=q.device)
        else:
            self.part, self.part_lse = self.out, self.lse

    def flags(self) -> dict[str, Any]:
        return {"PARTIAL": self.parts > 1, "WRITE_LSE": self.want_lse}

    def finish(self) -> tuple[Tensor, Tensor]:
        if self.parts > 1:
            combine[(self.rows,)](
                self.part, self.part_lse, self.out, self.lse, self.parts, DV=self.value_dim,
                BLOCK_DV=next_power_of_two(self.value_dim), BLOCK_S=min(32, next_power_of_two(self.parts)), WRITE_LSE=self.want_lse,
                num_warps=4,
            )  # fmt: skip
        return self.out, self.lse


def by_rows(x: Tensor) -> Tensor:
    """x with its last axis dense in memory."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def tiles(dim: int, value_dim: int, block_m: int, config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time sizes."""
    return {
        "D": dim, "DV": value_dim, "BLOCK_M": block_m, "BLOCK_N": config.block_n, "BLOCK_D": max(16, next_power_of_two(dim)),
        "BLOCK_DV": max(16, next_power_of_two(value_dim)), "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def launch_stream(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, offsets: Tensor | None, table: Tensor | None, kv_heads: int,
    scale: float, softcap: float | None, causal: bool, want_lse: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All keys. k `(B, Hk, n, D)`; with offsets `(total, D)`; with a table `(P, page, Hk, D)`. v alike."""
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    batch, heads, m, dim = q.shape
    value_dim, page = v.shape[-1], 0
    k_strides, v_strides = k.stride(), v.stride()
    if offsets is not None:
        # how long the longest head is, is known on the device only: splits are made for the mean
        n = -(-k.shape[0] // max(batch * kv_heads, 1))
        places = (0, 0, k_strides[0], 0, 0, v_strides[0])
    elif table is not None:
        page = k.shape[1]
        n = table.shape[1] * page
        places = (k_strides[0], k_strides[2], k_strides[1], v_strides[0], v_strides[2], v_strides[1])
    else:
        n = k.shape[2]
        places = (*k_strides[:3], *v_strides[:3])
    shape = Shape.of(heads // kv_heads, m)
    config = dense_config(max(dim, value_dim), q.dtype, table is not None) if config is None else config
    programs = batch * kv_heads * shape.row_blocks
    result = Result(q, value_dim, splits(programs, n, q, config), want_lse)
    if programs == 0 or value_dim == 0:
        return result.out, result.lse
    strides = q.stride()
    stream[(programs, result.parts)](
        q, k, v, result.part, result.part_lse, offsets if offsets is not None else q if lengths is None else lengths,
        q if table is None else table, scale, softcap or 1.0, n, m, strides[0], strides[1], strides[2], *places,
        0 if table is None else table.stride(0),
        HEADS=kv_heads, GROUP=shape.group, ROW_BLOCKS=shape.row_blocks, QT=m, LENGTHS=lengths is not None and offsets is None,
        RAGGED=offsets is not None, PAGE=page, CAUSAL=causal and m > 1, SOFTCAP=softcap is not None, **result.flags(),
        **tiles(dim, value_dim, shape.block_m, config, q.dtype),
    )  # fmt: skip
    return result.finish()


def fixed_size(block_k: int) -> int:
    """The tile size that a kernel is compiled for: a power of two, or 0 for any."""
    return block_k if block_k & (block_k - 1) == 0 else 0


def launch_listed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, table: Tensor | None, starts: Tensor, start_counts: Tensor,
    tokens: Tensor, token_counts: Tensor, log_weight: Tensor | None, block_q: int, block_k: int, n_k: int,
    scale: float, softcap: float | None, causal: bool, want_lse: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The keys of a Selection's lists; k and v as in `launch_stream`, without offsets."""
    q, k, v = by_rows(q), by_rows(k), by_rows(v)
    batch, heads, m, dim = q.shape
    value_dim, page = v.shape[-1], 0
    k_strides, v_strides = k.stride(), v.stride()
    if table is not None:
        page, kv_heads = k.shape[1], k.shape[2]
        places = (k_strides[0], k_strides[2], k_strides[1], v_strides[0], v_strides[2], v_strides[1])
    else:
        kv_heads = k.shape[1]
        places = (*k_strides[:3], *v_strides[:3])
    list_heads = heads if max(starts.shape[1], tokens.shape[1]) > kv_heads else kv_heads
    block_q = min(block_q, m)
    query_tiles = -(-m // block_q) if m else 1
    shape = Shape.of(heads // list_heads, block_q)
    config = listed_config(max(dim, value_dim), q.dtype) if config is None else config
    programs = batch * list_heads * query_tiles * shape.row_blocks
    result = Result(
        q, value_dim, splits(programs, max(starts.shape[-1] * block_k, tokens.shape[-1]), q, config), want_lse
    )
    if programs == 0 or value_dim == 0:
        return result.out, result.lse
    strides = q.stride()
    listed[(programs, result.parts)](
        q, k, v, result.part, result.part_lse, q if lengths is None else lengths, q if table is None else table,
        starts.contiguous(), start_counts.contiguous(), tokens.contiguous(), token_counts.contiguous(),
        q if log_weight is None else log_weight.contiguous(), starts.shape[-1], tokens.shape[-1], block_k, scale, softcap or 1.0, n_k,
        m,
        strides[0], strides[1], strides[2], *places, 0 if table is None else table.stride(0),
        START_BATCH=starts.shape[0], START_HEADS=starts.shape[1], TOKEN_BATCH=tokens.shape[0], TOKEN_HEADS=tokens.shape[1],
        BLOCK_K=fixed_size(block_k), TILED=starts.shape[-1] > 0, SINGLE=tokens.shape[-1] > 0, WEIGHTED=log_weight is not None,
        HEADS=list_heads, KV_HEADS=kv_heads, GROUP=shape.group, TILES=query_tiles, ROW_BLOCKS=shape.row_blocks, QT=block_q,
        LENGTHS=lengths is not None, PAGE=page, CAUSAL=causal and m > 1, SOFTCAP=softcap is not None, **result.flags(),
        **tiles(dim, value_dim, shape.block_m, config, q.dtype),
    )  # fmt: skip
    return result.finish()
