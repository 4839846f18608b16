"""Tile sizes and the number of splits, from shapes and dtypes alone: nothing is read from the device."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.gpu import multiprocessors, next_power_of_two

START = 100
ROWS = 64  # query rows of one tile at most; more are taken in several tiles


class Config(NamedTuple):
    """block_n: keys of a tile. warps and stages: of a program. programs: how many run side by side on a multiprocessor, by their
    registers and shared memory. least: keys that a split has at least."""

    block_n: int
    warps: int
    stages: int
    programs: int = 3
    least: int = 256


def dense_config(dim: int, dtype: torch.dtype, paged: bool = False) -> Config:
    """For keys read one after another; dim is the larger of D and Dv."""
    if dtype == torch.float32:
        return Config(32 if dim <= 128 else 16, 8, 2, 4)
    # page numbers are loaded ahead of the keys: twice the stages give the same number of tiles under way
    stages = 5 if paged else 3
    if dim <= 64:
        return Config(128, 4, stages)
    return Config(64 if dim <= 128 else 32, 4, stages)


def listed_config(dim: int, dtype: torch.dtype) -> Config:
    """For listed keys: short loops."""
    if dtype == torch.float32:
        return Config(32 if dim <= 128 else 16, 8, 2, 4, 64)
    # ids are loaded ahead of their keys: five stages leave two tiles under way, as three do where no ids are read
    return Config(64 if dim <= 128 else 32, 4, 5, 2, 128)


class Shape(NamedTuple):
    """How the query rows of one list head lie in tiles."""

    group: int
    queries: int
    block_m: int
    row_blocks: int

    @classmethod
    def of(cls, group: int, queries: int) -> Shape:
        total = group * queries
        block = min(ROWS, max(16, next_power_of_two(total)))
        return cls(group, queries, block, -(-total // block))


def splits(programs: int, keys: int, x: Tensor, config: Config) -> int:
    """Into how many parts `keys` keys are divided, with `programs` programs for each part: few, and filling whole rounds of
    multiprocessors."""
    slots, most = _multiprocessors(x) * config.programs, -(-keys // config.least)
    best, least = 1, None
    for wanted in (1, 2, 3, 4, *(slots * rounds // max(programs, 1) for rounds in (1, 2, 3, 4))):
        s = max(1, min(wanted, most))
        # rounds of programs, each with its keys and as much time for beginning and ending as START keys take
        time = -(-programs * s // slots) * (-(-keys // s) + START)
        if least is None or time < least:
            best, least = s, time
    return best


def _multiprocessors(x: Tensor) -> int:
    return _known(x.device) if x.is_cuda else multiprocessors(x)


@lru_cache(maxsize=16)
def _known(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
