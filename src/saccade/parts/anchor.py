"""Sink and local keys as an anchor: what every query reads anyway, and how high its logits reach there.

Queries come in groups of `step` blocks. The blocks of a group share the local keys, which begin `local` blocks before the group, and
whatever is found in between; so three ranges partition the past of a row: the first keys, the middle, and the local ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Selection
from saccade.ops.estimate import pool_blocks
from saccade.ops.estimate.reference import products
from saccade.parts.lists import KeyLists, hits, run_tiles

HELD = 1 << 24  # logits held at a time


@dataclass(frozen=True, kw_only=True)
class AnchorGrid:
    """`n_q` queries at the end of n_k keys in groups of `step` blocks of `block` tokens. initial, local: blocks.

    Rows after the last whole group, which are at least `tail`, read everything.
    """

    n_q: int
    n_k: int
    block: int
    step: int
    initial: int
    local: int
    tail: int = 0

    @property
    def group(self) -> int:
        """Queries in a group."""
        return self.step * self.block

    @property
    def groups(self) -> int:
        """Whole groups."""
        return max(0, self.n_q - self.tail) // self.group

    @property
    def rest(self) -> int:
        """Rows after the last whole group."""
        return self.n_q - self.groups * self.group

    @property
    def rest_tiles(self) -> int:
        return -(-self.rest // self.group)

    @property
    def first(self) -> int:
        """Keys that every row reads (if they are not in its future)."""
        return self.initial * self.block

    def starts(self, device: torch.device | str = "cpu") -> Tensor:
        """Position of the first query of each group, int64 `(groups,)`."""
        return torch.arange(self.groups, device=device) * self.group + self.n_k - self.n_q

    def local_begins(self, device: torch.device | str = "cpu") -> Tensor:
        """Where the local keys of each group begin, int64 `(groups,)`; the first keys are not among them."""
        return (self.starts(device) - self.local * self.block).clamp(min=self.first)

    def anchors(self, device: torch.device | str = "cpu") -> Selection:
        """What is read before anything is chosen; B and H are 1."""
        return self.reading(torch.empty(1, 1, self.groups, 0, dtype=torch.int32, device=device))

    def reading(self, listed: Tensor) -> Selection:
        """Anchors and the chosen keys `(B, H, groups, m)`."""
        begins, ends = self.local_begins(listed.device), self.starts(listed.device) + self.group
        zero, first = torch.zeros_like(ends), ends.clamp(max=self.first)
        if self.rest:
            begins, ends, zero, first = (torch.nn.functional.pad(x, (0, self.rest_tiles)) for x in (begins, ends, zero, first))
            ends[self.groups :] = self.n_k
            begins[self.groups :] = first[self.groups :] = min(self.first, self.n_k)
        tiles = [run_tiles(zero, first, self.block, self.n_k), run_tiles(begins, ends, self.block, self.n_k)]
        starts = torch.cat(tiles, dim=-1).sort(-1).values.expand(*listed.shape[:2], -1, -1)
        return KeyLists(starts, self._whole(listed)).selection(n_q=self.n_q, n_k=self.n_k, block=self.block, block_q=self.group)

    def stripes(self, listed: Tensor) -> Selection:
        """The chosen keys alone."""
        lists = KeyLists(self._whole(listed[..., :0]), self._whole(listed))
        return lists.selection(n_q=self.n_q, n_k=self.n_k, block=self.block, block_q=self.group)

    def _whole(self, listed: Tensor) -> Tensor:
        """With empty lists for the last rows."""
        return torch.nn.functional.pad(listed, (0, 0, 0, self.rest_tiles), value=self.n_k)


def row_maxima(q: Tensor, k: Tensor, grid: AnchorGrid, *, scale: float, softcap: float | None = None) -> Tensor:
    """The highest logit of each row over its anchor keys, float32 (float64 for float64) `(B, Hq, rows)`.

    q `(B, Hq, n_q, D)`, k `(B, Hk, n_k, D)`; the rows of whole groups only. Works through one block of every group at a time.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    b, offset = grid.block, grid.n_k - grid.n_q
    rows = q[:, :, : grid.n_q - grid.rest].to(exact)
    blocks = rows.unflatten(1, (k.shape[1], -1)).unflatten(3, (grid.groups, grid.step, b))
    first = k[:, :, : grid.first].to(exact)
    reach = grid.local * b
    short = max(0, reach - offset)
    near = torch.nn.functional.pad(k.to(exact), (0, 0, short, 0))[:, :, offset + short - reach :]
    row = torch.arange(b, device=q.device).unsqueeze(-1)
    future = torch.arange(b, device=q.device) > row
    # only the first few groups have local keys before the first one, or first keys in their future
    starts = grid.starts(q.device)
    few, young = (min(grid.groups, max(0, -(-(keys - offset) // grid.group))) for keys in (reach, grid.first))
    missing = (torch.arange(reach, device=q.device) + starts[:few].unsqueeze(-1) - reach < 0).unsqueeze(1)
    found = []
    for j in range(grid.step):
        # the queries of a group of heads become rows over their key/value head: (B, Hk, groups, heads * b, D)
        own = blocks[:, :, :, :, j].transpose(2, 3).flatten(3, 4)
        windows = near.unfold(2, reach + (j + 1) * b, grid.group)[:, :, : grid.groups]
        z = own @ windows
        z[:, :, :few, :, :reach].masked_fill_(missing, -torch.inf)
        z[..., -b:].unflatten(3, (-1, b)).masked_fill_(future, -torch.inf)
        best = z.amax(-1)
        if grid.first:
            sunk = own @ first.unsqueeze(2).mT
            places = (starts[:young] + j * b).view(-1, 1, 1, 1) + row
            hidden = torch.arange(grid.first, device=q.device) > places
            sunk[:, :, :young].unflatten(3, (-1, b)).masked_fill_(hidden, -torch.inf)
            best = torch.maximum(best, sunk.amax(-1))
        found.append(best.unflatten(3, (-1, b)))
    maxima = torch.stack(found, dim=4).transpose(2, 3).flatten(3, 5).flatten(1, 2) * scale
    return maxima if softcap is None else softcap * torch.tanh(maxima / softcap)


def within(q: Tensor, k: Tensor, maxima: Tensor, grid: AnchorGrid, theta: float, *, scale: float, softcap: float | None = None) -> Tensor:
    """Keys between the first and the local ones that some block of a group scores at most `theta` below its anchor.

    A block scores a key by its mean query; its anchor is the mean of its rows' maxima `(B, Hq, rows)`. Logits are natural-log units.
    Returns ascending ids int32 `(B, Hq, groups, m)`, past the end n_k.
    """
    anchor = maxima.unflatten(2, (grid.groups, grid.step, grid.block)).mean(-1)
    pooled = pool_blocks(q[:, :, : grid.n_q - grid.rest], grid.block).to(anchor.dtype).unflatten(2, (grid.groups, grid.step)) * scale
    begins = grid.local_begins(q.device)
    keys = torch.arange(grid.n_k, device=q.device)
    # in the dtype of the products once, not for each run of groups anew
    k = k.to(anchor.dtype)
    at_once = max(1, HELD // (q.shape[0] * q.shape[1] * grid.step * grid.n_k))
    found = []
    for groups in torch.arange(grid.groups).split(at_once):
        here = slice(int(groups[0]), int(groups[-1]) + 1)
        middle = slice(grid.first, max(grid.first, grid.n_k - grid.n_q + int(groups[-1]) * grid.group - grid.local * grid.block))
        z = products(pooled[:, :, here].flatten(2, 3), k[:, :, middle])
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        near = (z.add_(theta).unflatten(2, (-1, grid.step)) >= anchor[:, :, here].unsqueeze(-1)).any(3)
        listed = hits(near & (keys[middle] < begins[here].unsqueeze(-1)))
        found.append(torch.where(listed < near.shape[-1], listed + grid.first, grid.n_k))
    longest = max(part.shape[-1] for part in found)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=grid.n_k) for part in found], dim=2)
