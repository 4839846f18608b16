"""DHSA: the prompt is cut where its content changes, and each block of queries reads the tokens of the chunks that suit it best.

    kc = sqrt(|C|) * mean_{j in C} k_j,   qc = mean of a block of queries        (q and k averaged over heads)
    score of token j for the block = qc . kc of the chunk that holds j

Each block reads the first `sinks` keys, its `local` most recent ones, and fills its budget with the tokens of the highest scores; the
list serves all heads. Where to cut says a small network per layer, trained on the dense model's attention (`saccade calibrate dhsa`,
`parts/boundaries.py`). Without a plan chunks are equally long. The last `instruction` queries, and single tokens, read everything.

Source: dhsa, arXiv 2510.24606. The authors' code makes place for the first keys by giving up the earliest ones chosen; here they come
out of the budget before it is filled, so that what is given up scores lowest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Calibrated, Info, LayerContext, Prefill, Selection, register
from saccade.parts import patterns
from saccade.parts.boundaries import boundary_labels, boundary_scores, train_predictor
from saccade.parts.chunks import best_chunks, chunk_starts, scaled_means, separated_peaks
from saccade.parts.lists import KeyLists, open_rows, tile_ends
from saccade.parts.pooling import pool_mean
from saccade.parts.sizes import check_size, resolve

PLAN = "boundaries."  # in front of the network's tensors in a plan


@register
@dataclass(frozen=True, kw_only=True)
class DHSA(Prefill, Calibrated):
    """budget: keys read by each block of queries, forced ones included; tokens, or a share of the prompt in (0, 1].
    local, sinks: most recent keys of a block (at least `block`), first keys of the prompt; both always read. instruction: last queries
    that read everything, rounded up to whole blocks; a chunk begins with them. block: queries per block, tokens.
    chunk: mean length of a chunk, tokens. apart: two learned boundaries are further apart than this. threshold: least score of a
    boundary; labels are at least 0.5. reach: keys on each side of a gap that the network sees. hidden: width of its last layer.
    steps: of its training, on 128 gaps each.
    """

    budget: int | float = 1024
    local: int = 128
    sinks: int = 128
    instruction: int = 64
    block: int = 32
    chunk: int = 32
    apart: int = 8
    threshold: float = 0.5
    reach: int = 4
    hidden: int = 256
    steps: int = 100

    info = Info(
        slug="dhsa", phase="prefill", opened={"budget": 1.0},
        tiny={"budget": 24, "local": 8, "sinks": 4, "instruction": 8, "block": 8, "chunk": 6, "apart": 2},
        opts_out={
            "chunked": "every chunk of a prompt has its own last queries that read everything, and keys are cut anew",
            "stepwise": "single tokens are decoded densely, only a prompt that comes at once is read sparsely",
            "future": "where keys are cut, and what stands for a chunk, depends on keys after the query; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_size("dhsa", "budget", self.budget)
        least = {"local": 1, "sinks": 0, "instruction": 0, "block": 1, "chunk": 1, "apart": 0, "reach": 1, "hidden": 1, "steps": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ValueError(f"dhsa({name}={value!r}) is not a whole number of at least {smallest}")
        if self.local < self.block:
            raise ValueError(f"dhsa(local={self.local}) is less than a block of {self.block} queries, which then would not see themselves")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, int | float) or not 0 <= self.threshold < 1:
            raise ValueError(f"dhsa(threshold={self.threshold!r}) is not a score in [0, 1)")

    # -- online ------------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        starts = self.cut(ctx, k)
        # a factor for a whole block of queries changes no choice, so their means serve as they are
        chunk_scores = pool_mean(q.to(exact).mean(1), self.block) @ scaled_means(k.to(exact).mean(1), starts).mT
        ends = tile_ends(n_q, n_k, self.block, q.device)
        sinks, local = (torch.tensor([[size]], device=q.device) for size in (self.sinks, self.local - self.block + 1))
        forced = patterns.a_shape(sinks, local, ends, self.block, n_k)
        recent = (ends - self.local).clamp(min=0)
        room = resolve(self.budget, n_k) - recent.clamp(max=self.sinks) - (ends - recent)
        chosen = best_chunks(chunk_scores, starts, self.sinks, recent, room.clamp(min=0), n_k).unsqueeze(1)
        lead = chosen.shape[:3]
        tokens = torch.cat([forced.tokens.expand(*lead, -1), chosen], dim=-1).sort(-1).values
        lists = KeyLists(forced.starts.expand(*lead, -1), tokens)
        if self.instruction:
            lists = open_rows(lists, n_q=n_q, n_k=n_k, last=self.instruction, block=self.block)
        return lists.selection(n_q=n_q, n_k=n_k, block=self.block)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or resolve(self.budget, k.shape[2]) >= k.shape[2]:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    def cut(self, ctx: LayerContext, k: Tensor) -> Tensor:
        """First positions of the chunks of keys `(B, Hk, n, D)`: int64 `(B, M)`, past a row's last chunk n."""
        n = k.shape[2]
        forced = torch.tensor([0, max(0, n - self.instruction)] if self.instruction else [0], device=k.device)
        if ctx.plan is None:
            begins = (torch.arange(n, device=k.device) % self.chunk == 0).expand(k.shape[0], -1)
            return chunk_starts(begins.index_fill(-1, forced, True))
        state = {name: ctx.found(PLAN + name) for name in _names(ctx)}
        scores = boundary_scores(_side_by_side(k), state, self.reach)
        scores = scores.masked_fill(scores <= self.threshold, -torch.inf)
        return chunk_starts(separated_peaks(scores, self.apart, math.ceil(n / self.chunk), forced))

    # -- offline -----------------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """What the network learns from: "keys" `(B * N, C)` float32 and "labels" `(B * N,)`, nan where there is none."""
        labels = boundary_labels(q, k, self.reach, scale=ctx.scale, softcap=ctx.softcap)
        return {"keys": _side_by_side(k).float().flatten(0, 1), "labels": labels.flatten()}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Samples one after the other; their ends have no labels, so no gap reaches over them."""
        return {name: torch.cat([sums[name], value]) if name in sums else value for name, value in found.items()}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The trained network of this layer, float32."""
        state = train_predictor(sums["keys"], sums["labels"], reach=self.reach, hidden=self.hidden, steps=self.steps)
        return {PLAN + name: value for name, value in state.items()}


def _side_by_side(k: Tensor) -> Tensor:
    """Keys of all heads in one row: `(B, Hk, n, D)` to `(B, n, Hk * D)`, float32 (float64 for float64)."""
    exact = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.transpose(1, 2).flatten(2).to(exact)


def _names(ctx: LayerContext) -> list[str]:
    assert ctx.plan is not None
    front = f"layer.{ctx.layer}.{PLAN}"
    names = [name.removeprefix(front) for name in ctx.plan.tensors if name.startswith(front)]
    return names or ["mix.weight"]
