"""One low-bit attention call, validated, and its query tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.attend.problem import Problem

KINDS = ("int8", "fp8")
VALUES = ("same", "fp16", "fp8")


@dataclass(frozen=True, kw_only=True)
class LowBit:
    """problem: the call as plain attention would get it; it has no bias. The rest as in `attend_low_bit`."""

    problem: Problem
    qk: str
    pv: str
    smooth: bool
    block_q: int
    block_k: int
    skip_below: float | None

    def check(self) -> None:
        p, s = self.problem, self.problem.selection
        if p.softcap is not None and not p.softcap > 0:
            raise ValueError(f"softcap {p.softcap} must be positive, or None for no cap")
        for name, value, known in (("qk", self.qk, KINDS), ("pv", self.pv, VALUES)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")
        for name, size in (("block_q", self.block_q), ("block_k", self.block_k)):
            if size not in (32, 64, 128, 256):
                raise ValueError(f"{name} {size!r} is not a power of two from 32 to 256")
        if self.skip_below is not None and not self.skip_below >= 0:
            raise ValueError(f"skip_below {self.skip_below} must be at least 0 (base-2 exponents), or None to skip nothing")
        if s is None:
            return
        if (s.n_q, s.n_k) != (p.q.shape[2], p.k.shape[2]):
            raise ValueError(
                f"the selection is over {s.n_q} queries and {s.n_k} keys, q and k have {p.q.shape[2]} and {p.k.shape[2]}: "
                "build it for these tensors"
            )
        if s.batch not in (1, p.q.shape[0]) or s.heads not in (1, p.k.shape[1], p.q.shape[1]):
            raise ValueError(
                f"the selection has batch {s.batch} and {s.heads} heads: expected batch 1 or {p.q.shape[0]} and 1, {p.k.shape[1]} or "
                f"{p.q.shape[1]} heads"
            )
        if s.device != p.q.device:
            raise ValueError(f"the selection is on {s.device} and q on {p.q.device}: build it on one device")
        if self.skip_below is not None and not self.in_steps:
            raise ValueError(
                f"skip_below needs aligned key tiles of a multiple of block_k {self.block_k} and no single keys; the selection has tiles "
                f"of {s.block_k}{'' if s.aligned else ', unaligned,'} and up to {s.tokens.shape[-1]} single keys for a query tile"
            )

    @property
    def in_steps(self) -> bool:
        """Whether what is read is made of whole, aligned steps of block_k keys."""
        s = self.problem.selection
        return s is None or (s.block_k % self.block_k == 0 and s.aligned and s.tokens.shape[-1] == 0)

    @property
    def rows(self) -> int:
        """Query rows of one step, at most."""
        s = self.problem.selection
        return self.block_q if s is None else min(self.block_q, s.block_q)

    def query_tiles(self) -> tuple[Tensor, Tensor]:
        """Rows `(T, rows)` of the query tiles that steps are taken with, n_q past a tile's end, and the selection's tile `(T,)` of each."""
        s, n_q, device = self.problem.selection, self.problem.q.shape[2], self.problem.q.device
        block_q = self.rows if s is None else s.block_q
        inner = torch.arange(0, block_q, self.rows, device=device)
        begin = (torch.arange(0, n_q, block_q, device=device)[:, None] + inner).flatten()
        tile = begin // block_q
        rows = begin[:, None] + torch.arange(self.rows, device=device)
        rows = rows.masked_fill(rows >= (tile[:, None] + 1) * block_q, n_q).clamp(max=n_q)
        return rows, tile
