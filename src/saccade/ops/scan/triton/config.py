"""Tile sizes and launch shapes, chosen from head dims, dtype and form; and how a sequence is cut into segments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor

from saccade.ops.gpu import multiprocessors, next_power_of_two


@dataclass(frozen=True, kw_only=True)
class Config:
    """chunk: tokens a step, 32 or 64. columns: width of a block of values per program. programs: how many programs per multiprocessor a
    walk over segments should have; shortest: the fewest chunks of a segment. precision: of matmuls of inputs, solve: of the triangular
    inverse, carry: of the maps of segments. The rest are warps and pipeline stages of the kernels. Chunks of 64 rows want 4 warps: with 8,
    both halves would compute the same rows. `levels` has 2, so that its products run on mma.sync: wgmma may lose left factors that were
    computed in registers (Triton 3.4 to 3.7 with the assembler of CUDA 12.9), and several are in flight there. `channel` has tiles of 16
    tokens and one warp: what a product gives lies as the next one wants it. channel_columns, level_columns and near_columns: channels a
    step; 16 in `channel` and `near` is as many as registers hold. channel_registers, near_registers: the most of a thread, None for any."""

    chunk: int = 64
    columns: int = 64
    programs: float = 2.0
    shortest: int = 4
    precision: str = "tf32"
    solve: str = "tf32"
    walk_warps: int = 4
    walk_stages: int = 2
    maps_columns: int = 128
    maps_warps: int = 8
    maps_stages: int = 2
    carry_columns: int = 64
    carry_warps: int = 8
    carry: str = "tf32"
    products_warps: int = 4
    channel_columns: int = 16
    channel_warps: int = 1
    channel_stages: int = 2
    channel_registers: int | None = None
    transform_warps: int = 2
    back_columns: int = 64
    back_programs: float = 1.0
    back_stages: int = 2
    pair_warps: int = 4
    pair_stages: int = 1
    grad_columns: int = 64
    grad_values: int = 64
    grad_warps: int = 4
    grad_stages: int = 1
    level_columns: int = 32
    level_warps: int = 2
    level_stages: int = 1
    near_columns: int = 16
    near_stages: int = 1
    near_registers: int | None = None

    @cached_property
    def back(self) -> Config:
        """The same for the walks that keep states for the backward pass."""
        return replace(self, columns=self.back_columns, programs=self.back_programs)


@cache  # every call asks, and a frozen dataclass takes long to make
def config(d: int, dv: int, dtype: torch.dtype, *, delta: bool, channel: bool) -> Config:
    """The table: made for sm_90; float32 takes narrow tiles, as its products run on the plain units, exactly."""
    wide = max(next_power_of_two(d), 16)
    if dtype == torch.float32:
        return Config(
            chunk=32, columns=16, maps_columns=16, carry_columns=16, precision="ieee", solve="ieee", carry="ieee", walk_stages=1,
            maps_warps=4, maps_stages=1, back_columns=16, back_stages=1,
            grad_columns=16, grad_values=16, grad_stages=1, level_columns=16, channel_stages=1,
        )  # fmt: skip
    chosen = Config()
    if wide > 128:
        chosen = replace(chosen, columns=32, maps_columns=64, walk_stages=1, maps_stages=1, back_columns=32, back_stages=1)
    if delta:
        chosen = replace(chosen, maps_columns=64, maps_warps=4)
    if delta and channel:  # three or six registers kept in memory make room for half as many programs more
        chosen = replace(chosen, channel_registers=168, near_registers=168)
    return chosen


def padded(width: int, dtype: torch.dtype) -> int:
    """The width of a tile that holds a head dim: a power of two. Tiles of 16 bits have 64 columns at least, as wide as wgmma wants."""
    return max(16 if dtype == torch.float32 else 64, next_power_of_two(width))


@dataclass(frozen=True)
class Cut:
    """slots: segments in all. per_sequence: of one sequence, where none are packed. length: tokens of a segment, a multiple of the
    chunk. table: `(slots, 5)` int32 for packed sequences: sequence, start, end, start and end of the sequence."""

    slots: int
    per_sequence: int
    length: int
    table: Tensor | None

    @property
    def split(self) -> bool:
        return self.per_sequence > 1


def cut(n: int, batch: int, length: int, cu_seqlens: Tensor | None) -> Cut:
    """Segments of `length` tokens. Without waiting for the device: packed sequences get as many slots as any lengths could need."""
    each = -(-n // length)
    if cu_seqlens is None:
        return Cut(batch * each, each, length, None)
    ends = cu_seqlens.long()
    sequences = ends.shape[0] - 1
    slots = n // length + sequences
    first = ends[:-1] // length + torch.arange(sequences, device=ends.device)
    slot = torch.arange(slots, device=ends.device)
    owner = torch.searchsorted(first, slot, right=True) - 1
    stop = ends[owner + 1]
    start = ends[owner] + (slot - first[owner]) * length
    end = torch.minimum(start + length, stop)
    table = torch.stack([owner, torch.minimum(start, end), end, ends[owner], stop], dim=1)
    return Cut(slots, each, length, table.to(torch.int32))


def segment_length(c: Config, x: Tensor, n: int, sequences: int, heads: int, blocks: int, splits: bool) -> int:
    """Tokens of a segment: enough programs to fill the device, few enough to keep the walk across segments short."""
    whole = -(-n // c.chunk)
    wanted = c.programs * multiprocessors(x) / (sequences * heads * blocks)
    if not splits or wanted < 1.5:
        return whole * c.chunk
    # a whole number of segments of one length: a short one more would have to wait for a place
    return max(c.shortest, -(-whole // max(2, int(wanted)))) * c.chunk
