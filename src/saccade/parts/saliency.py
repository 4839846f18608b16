"""Which tokens matter, from a few probe queries: attention column mass per query that could have seen the token.

    s_j = sum over probe rows i and query heads of a group of softmax_i(q_i . k_j),    p_j = s_j / |{probe rows i >= j}|

Early tokens are seen by more rows than late ones, so plain column sums favour them; dividing by the exact number of probe rows that
can see a token does not. Probe rows are the most recent positions and some of the others, drawn by a hash of the
position: a prompt in chunks has the probe rows of a prompt at once, and only the queries that may be needed are remembered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

SPARE = 16  # latest queries always remembered: so many guessed tokens may be taken back
RUNS = 16  # pieces that are cut out one by one, where an index list would have to reach the device first
PAIRS = 1 << 24  # (query, key) pairs whose probabilities are held at a time


def hashed(indices: Tensor, seed: int) -> Tensor:
    """A number from 0 to 2^32 - 1 for each index (int64, any shape), always the same for a seed."""
    word = 0xFFFFFFFF
    x = (indices * 0x9E3779B1 + ((seed * 0x85EBCA77 + 0x165667B1) & word)) & word
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & word
    return x ^ (x >> 16)


def drawn(indices: Tensor, share: float, seed: int) -> Tensor:
    """Whether each index (int64, any shape) is among a fixed random `share` of all indices: a hash decides, bool."""
    return hashed(indices, seed).double() < share * 2**32


def cut_out(x: Tensor, places: Tensor) -> Tensor:
    """A copy of x `(B, H, n, D)` at `places (m,)`, ascending int64 on the CPU.

    Few runs of places are cut out: a list of places would have to be moved to the device, which waits for it, and which can't be
    recorded.
    """
    starts = [0, *((places.diff() != 1).nonzero().squeeze(-1) + 1).tolist(), len(places)]
    if not len(places) or len(starts) > RUNS + 1:
        return x.index_select(2, places.to(x.device))
    return torch.cat([x[:, :, int(places[a]) : int(places[b - 1]) + 1] for a, b in pairwise(starts)], dim=2)


@dataclass
class ProbeQueries:
    """Queries remembered until the tokens they saw are judged.

    share: of the n tokens judged together, the share that are probe rows: half the most recent, half drawn from the others.
    seed: of the draw. queries `(B, Hq, P, D)`, None at first; indices int64 `(P,)` on the CPU: which token of the sequence each belongs to
    (padding not counted), ascending. Holds about share * n queries while a prompt comes in: share * group / 2 of the bytes of its
    keys and values.
    """

    share: float
    seed: int
    queries: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    widest: int = 0  # the largest number of queries that came in one call

    def add(self, q: Tensor, seen: int, length: int) -> None:
        """Remember what may be needed of q `(B, Hq, m, D)`, the queries of the last m of `seen` tokens; `length` tokens are to be judged.

        Remembered queries of tokens that were taken back since are dropped.
        """
        m = q.shape[2]
        self.widest = max(self.widest, m)
        indices, held = torch.arange(seen - m, seen), q
        if self.queries is not None:
            known = self.indices.cpu()  # a loaded cache has them on the device
            still = int((known < seen - m).sum())
            indices = torch.cat([known[:still], indices])
            held = torch.cat([self.queries[:, :, :still], q], dim=2)
        # the most recent share begins no earlier than this, whatever is still to come and with up to SPARE tokens taken back
        recent = seen - length + self._recent_from(max(length - SPARE, 0))
        wanted = (drawn(indices, self._drawn_share, self.seed) | (indices >= recent)).nonzero().squeeze(-1)
        self.queries, self.indices = cut_out(held, wanted), indices[wanted]

    def rows(self, seen: int, length: int) -> tuple[Tensor | None, Tensor]:
        """The probe rows for the last `length` of `seen` tokens: queries `(B, Hq, P, D)`, and their slots among those tokens `(P,)`."""
        first = seen - length
        recent = self.indices >= first + self._recent_from(length)
        probe = recent | drawn(self.indices, self._drawn_share, self.seed)
        return self._picked(probe & (self.indices >= first) & (self.indices < seen), first)

    def last(self, seen: int, length: int) -> tuple[Tensor | None, Tensor]:
        """Only the latest query, in the form of `rows`."""
        return self._picked(self.indices == seen - 1, seen - length)

    def reorder(self, rows: Tensor) -> ProbeQueries:
        """A copy for these batch rows."""
        taken = None if self.queries is None else self.queries.index_select(0, rows.to(self.queries.device))
        return ProbeQueries(self.share, self.seed, taken, self.indices, self.widest)

    @property
    def nbytes(self) -> int:
        return 0 if self.queries is None else self.queries.untyped_storage().nbytes()

    @property
    def _drawn_share(self) -> float:
        """Share of the other tokens that makes half of `share` of all tokens."""
        return self.share / 2 / (1 - self.share / 2)

    def _recent_from(self, n: int) -> int:
        """First of n tokens that belongs to the most recent ones."""
        return n - math.ceil(round(self.share / 2 * n, 9))

    def _picked(self, chosen: Tensor, first: int) -> tuple[Tensor | None, Tensor]:
        which = chosen.nonzero().squeeze(-1)
        slots = self.indices[which] - first
        if self.queries is None:
            return None, slots
        return self.queries.index_select(2, which.to(self.queries.device)), slots.to(self.queries.device)


def column_mass(
    q: Tensor, slots: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, places: Tensor | None = None
) -> Tensor:
    """Attention that each of the keys k `(B, Hk, n, D)` gets from probe rows q `(B, Hq, P, D)`: float32 `(B, Hk, n)`.

    Row i stands at `slots[i]` and sees the keys up to it; its softmax runs over those. Summed over rows and a group's query heads.
    places: where each key stands, int64 `(B, Hk, n)` ascending, default 0 ... n - 1.
    """
    groups = k.shape[1]
    n = k.shape[2]
    total = torch.zeros(k.shape[0], groups, n, device=k.device)
    keys = torch.arange(n, device=k.device) if places is None else places[:, :, None, None]
    k = k.float().unsqueeze(2)
    step = max(1, PAIRS // max(1, q.shape[0] * q.shape[1] * n))
    for begin in range(0, q.shape[2], step):
        rows = q[:, :, begin : begin + step].float().unflatten(1, (groups, -1))
        logits = (rows @ k.mT) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill_(keys > slots[begin : begin + step, None], -torch.inf)
        total += torch.softmax(logits, dim=-1).sum((2, 3))
    return total


def normalised_saliency(
    q: Tensor | None, slots: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, places: Tensor | None = None
) -> Tensor:
    """`column_mass` divided by the number of probe rows that can see each key, float32 `(B, Hk, n)`; arguments as there.

    Keys that no probe row can see get inf: nothing is known against them. q may be None where there is no probe row.
    """
    if q is None or not len(slots):
        return torch.full(k.shape[:3], torch.inf, device=k.device)
    keys = torch.arange(k.shape[2], device=k.device) if places is None else places.contiguous()
    seen_by = len(slots) - torch.searchsorted(slots.sort().values, keys)
    mass = column_mass(q, slots, k, scale=scale, softcap=softcap, places=places)
    return torch.where(seen_by > 0, mass / seen_by.clamp(min=1), torch.inf)
