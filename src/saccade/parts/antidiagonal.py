"""Scores of tiles from sums along strided antidiagonals: every query and every key takes part, in a product of N / stride rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saccade.ops.estimate import TileGrid, cpu
from saccade.ops.estimate.reference import products

ROWS = 1 << 22  # entries of the reduced map held at a time


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def antidiagonal_mass(q: Tensor, k: Tensor, block: int, stride: int, seen: Tensor, *, scale: float) -> Tensor:
    """Softmax mass of each tile over reduced logits, float32 (float64) `(B, Hq, Tq, Tk)`; rows of tiles sum to 1, or 0 where none is seen.

    A reduced logit is the mean of `scale * q_i.k_j` over the antidiagonal i + j = const of a square of `stride` tokens; the stride divides
    the block. q `(B, Hq, Nq, D)`, k `(B, Hk, Nk, D)`; seen: bool `(Tq, Tk)`, tiles that take part. A last incomplete square
    counts what is missing as logits of 0.
    Source: pbs-attn, arXiv 2510.21270, its variant with the block scores of XAttention.
    """
    if block % stride:
        raise ValueError(f"antidiagonal_mass: stride {stride} does not divide blocks of {block}")
    per_tile = block // stride
    a, b = (pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, stride)) for x in (q, k))
    # the r-th query of a square meets its r-th key from the end
    a, b = a.flatten(3), b.flip(3).flatten(3)
    if _on_cpu(q):
        grid = TileGrid(n_q=a.shape[2], n_k=b.shape[2], block_q=per_tile, block_k=per_tile, causal=False)
        return cpu.pooled_probabilities(a, b, grid, offset=0, scale=scale / stride, softcap=0.0, total=True, seen=seen) / per_tile
    tiles = seen.shape[0]
    together = max(1, ROWS // max(1, per_tile * b.shape[2] * q.shape[0] * q.shape[1]))
    found = []
    for begin in range(0, tiles, together):
        rows = a[:, :, begin * per_tile : (begin + together) * per_tile]
        hidden = ~seen[begin : begin + together].repeat_interleave(per_tile, 0).repeat_interleave(per_tile, 1)
        logits = (products(rows, b) * (scale / stride)).masked_fill_(hidden, -torch.inf)
        mass = logits.softmax(-1).nan_to_num_(0.0)
        found.append(mass.unflatten(-1, (-1, per_tile)).sum(-1).unflatten(2, (-1, per_tile)).mean(3))
    return torch.cat(found, dim=2)
