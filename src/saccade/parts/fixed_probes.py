"""A fixed number of probe queries: the most recent ones and some drawn from all others, whatever the length turns out to be.

Every query has a rank that a hash of its place gives; of those before the recent ones, the queries of lowest rank are the random probes. So
a prompt in chunks has the probes of a prompt at once, and no more than they are remembered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from saccade.parts.recent_queries import GUESSES
from saccade.parts.saliency import cut_out, hashed


@dataclass
class FixedProbes:
    """recent, drawn: how many probes of each kind. seed: of the draw.

    queries `(B, Hq, P, D)`, None at first; indices int64 `(P,)` on the CPU: which token of the sequence each belongs to, ascending.
    """

    recent: int
    drawn: int
    seed: int
    queries: Tensor | None = None
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def add(self, q: Tensor, seen: int) -> None:
        """Remember what may be needed of q `(B, Hq, m, D)`, the queries of the last m of `seen` tokens; those of tokens that were taken
        back since are dropped."""
        m = q.shape[2]
        indices, held = torch.arange(seen - m, seen), q
        if self.queries is not None:
            known = self.indices.cpu()  # a loaded cache has them on the device
            still = int((known < seen - m).sum())
            indices = torch.cat([known[:still], indices])
            held = torch.cat([self.queries[:, :, :still], q], dim=2)
        # up to GUESSES tokens may be taken back: then older queries are recent, and random ones are drawn from fewer
        late = indices >= seen - self.recent - GUESSES
        wanted = (late | self._lowest(indices, ~late)).nonzero().squeeze(-1)
        self.queries, self.indices = cut_out(held, wanted), indices[wanted]

    def rows(self, seen: int, length: int) -> tuple[Tensor | None, Tensor]:
        """The probes among the last `length` of `seen` tokens: queries `(B, Hq, P, D)`, and their slots among those tokens `(P,)`."""
        here = (self.indices >= seen - length) & (self.indices < seen)
        probe = here & ((self.indices >= seen - self.recent) | self._lowest(self.indices, here & (self.indices < seen - self.recent)))
        which = probe.nonzero().squeeze(-1)
        slots = self.indices[which] - (seen - length)
        if self.queries is None:
            return None, slots
        return self.queries.index_select(2, which.to(self.queries.device)), slots.to(self.queries.device)

    def reorder(self, rows: Tensor) -> FixedProbes:
        """A copy for these batch rows."""
        taken = None if self.queries is None else self.queries.index_select(0, rows.to(self.queries.device))
        return FixedProbes(self.recent, self.drawn, self.seed, taken, self.indices)

    @property
    def nbytes(self) -> int:
        return 0 if self.queries is None else self.queries.untyped_storage().nbytes()

    def _lowest(self, indices: Tensor, allowed: Tensor) -> Tensor:
        """The `drawn` allowed indices of lowest rank, bool."""
        ranked = hashed(indices, self.seed).masked_fill(~allowed, 1 << 40)
        order = torch.sort(ranked, stable=True).indices[: self.drawn]
        return torch.zeros_like(allowed).scatter_(0, order, True) & allowed
