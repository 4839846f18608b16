"""The transposed form of a Selection: which query tiles read each key tile."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.core.tilemath import list_true, mark

if TYPE_CHECKING:
    from saccade.core.selection import Selection


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyMajor:
    """Key tile t (keys `t*block_k ...`) is read by the listed query tiles. For backward passes and key-major methods.

    query_tiles: `(B, H, Tk, M)` int32 ascending, entries past counts `(B, H, Tk)` hold the number of query tiles.
    block_k is the selection's when its tiles are aligned and it lists no single keys, else 1, so that it is always exact.
    """

    n_q: int
    n_k: int
    block_q: int
    block_k: int
    query_tiles: Tensor
    counts: Tensor
    causal: bool

    def dense_mask(self) -> Tensor:
        """`(B, H, n_q, n_k)` bool, equal to the Selection's."""
        tiles = mark(self.query_tiles, math.ceil(self.n_q / self.block_q))
        mask = tiles.repeat_interleave(self.block_k, dim=2)[:, :, : self.n_k]
        mask = mask.transpose(-1, -2).repeat_interleave(self.block_q, dim=2)[:, :, : self.n_q]
        if self.causal:
            rows = torch.arange(self.n_q, device=mask.device) + self.n_k - self.n_q
            mask = mask & (torch.arange(self.n_k, device=mask.device) <= rows[:, None])
        return mask


def transpose(selection: Selection) -> KeyMajor:
    """Key-major lists of `selection`."""
    coverage = selection.coverage()
    block_k = selection.block_k if selection.aligned and selection.tokens.shape[-1] == 0 else 1
    # every key of an aligned tile has the same readers, so its first key speaks for the tile
    by_key = coverage[..., ::block_k].transpose(-1, -2)
    query_tiles, counts = list_true(by_key)
    return KeyMajor(
        n_q=selection.n_q, n_k=selection.n_k, block_q=selection.block_q, block_k=block_k, query_tiles=query_tiles,
        counts=counts, causal=selection.causal,
    )  # fmt: skip
