"""InfLLM: a sliding window, and a memory of blocks on the host whose few representative keys say which of them a chunk of queries reads.

A token's representative score is the mean product of its key with the queries that follow it within the window,

    r_m = 1 / (n_local - 1) sum_{j = 1}^{n_local - 1} q_{m + j}.k_m       (summed over the query heads of a key head),

so a block is scored once all its tokens have left the window. The `representatives` keys of a block with the highest r, head by head, are
averaged, unturned, into one vector a head. For a chunk of queries the blocks with the highest

    sum over heads of  mean_i q_i.(the block's vector),      queries turned to the place n_local,

are read by all heads: `blocks` of them, all while there are no more. Blocks read lately stay on the device (least recently used go).
The window, the first tokens and the fixed distance of far tokens are those of `saccade.methods.streaming`. Attach with when="call" to let
a prompt in chunks move to the host as it comes. Source: infllm, arXiv 2402.04617.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.offloaded import RecentUnits
from saccade.cache.stream import Stream
from saccade.core import Info, LayerContext, register
from saccade.methods.streaming import FarMemory, Retrieved
from saccade.parts.followers import RecentRows
from saccade.parts.growing import Growing
from saccade.parts.pick import pick_best
from saccade.parts.rotary import turn
from saccade.parts.rows import pick_rows


class BlockMemory:
    """queries: sums over the query heads of a key head, by place. vectors: of each block `(B, Hk, blocks, D)`. recent: blocks on the
    device."""

    def __init__(self, queries: RecentRows, recent: RecentUnits, vectors: Growing | None = None) -> None:
        self.queries, self.recent, self.vectors = queries, recent, vectors

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + self.recent.nbytes + (0 if self.vectors is None else self.vectors.nbytes)

    def reorder(self, rows: Tensor) -> BlockMemory:
        """A copy with these batch rows."""
        vectors = None if self.vectors is None else self.vectors.reorder(rows)
        return BlockMemory(self.queries.reorder(rows), self.recent.reorder(rows), vectors)


@register
@dataclass(frozen=True, kw_only=True)
class InfLLM(FarMemory):
    """n_local, n_init, chunk: the window, the first keys and the queries that share a retrieval.
    block: tokens of a block, b. representatives: r. blocks: blocks read, k (16 to 64). cached: blocks of a sequence held on the device, at
    least `blocks`.
    """

    block: int = 128
    representatives: int = 4
    blocks: int = 16
    cached: int = 32

    info = Info(
        slug="infllm", phase="prefill", also=frozenset({"decode", "cache"}), needs=frozenset({"queries"}), frees_memory=True,
        append_only=False, encodes=True, opened={"n_local": 1 << 30},
        tiny={"n_local": 16, "n_init": 2, "chunk": 8, "block": 4, "representatives": 2, "blocks": 3, "cached": 5},
        opts_out={
            "chunked": "chunks that share a retrieval are counted from the first query given, so calls cut them elsewhere",
            "stepwise": "the queries of a prompt's chunk share a retrieval, single tokens have their own",
            "future": "the queries of a chunk choose blocks together; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.check_window()
        for name in ("block", "representatives", "blocks", "cached"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"infllm({name}={value!r}) is not a whole number of at least 1")
        if self.representatives > self.block or self.blocks > self.cached:
            raise ValueError(
                f"infllm(representatives={self.representatives}, block={self.block}, blocks={self.blocks}, cached={self.cached}): a block "
                "holds its representatives, and the blocks read at once must fit among those held"
            )

    @property
    def unit(self) -> int:
        return self.block

    def fresh(self) -> BlockMemory:
        return BlockMemory(RecentRows(self.n_local + self.block + self.chunk), RecentUnits(self.cached))

    def take_in(self, ctx: LayerContext, memory: BlockMemory, stream: Stream, q: Tensor, begin: int) -> None:
        if self.n_local < 1 << 24:  # with a window that nothing ever leaves, no block will ask for them
            memory.queries.append(ctx.layout.to_groups(q.to(torch.promote_types(q.dtype, torch.float32))).sum(2), begin)

    def index(self, memory: BlockMemory, stream: Stream, count: int) -> Tensor:
        """The vectors of the first `count` blocks `(B, Hk, count, D)`, made for those that have none yet."""
        done = 0 if memory.vectors is None else memory.vectors.n
        if done > count and memory.vectors is not None:
            memory.vectors.truncate(count)
            memory.recent.forget_from(count)
        while done < count:
            # as many at a time as a chunk lets out of the window
            until = min(count, done + max(1, self.chunk // self.block))
            begin, end = (self.n_init + number * self.block for number in (done, until))
            places = torch.arange(begin, end, device=stream.k.device)
            keys = _unturned(stream, places, begin, end)
            exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
            turned = exact if stream.rotary is None else turn(exact, places, stream.rotary)
            followers = memory.queries.mean_after(begin, end, self.n_local)
            scores = (turned.to(torch.float64) * followers).sum(-1).unflatten(2, (-1, self.block))
            best = pick_best(scores, self.representatives) + (torch.arange(until - done, device=keys.device) * self.block).unsqueeze(-1)
            new = pick_rows(exact, best.flatten(2)).unflatten(2, (-1, self.representatives)).mean(3)
            if memory.vectors is None:
                memory.vectors = Growing(new)
            else:
                memory.vectors.append(new)
            done = until
        assert memory.vectors is not None
        return memory.vectors.view

    def choose(self, ctx: LayerContext, memory: BlockMemory, stream: Stream, q: Tensor, begin: int) -> Tensor:
        """The blocks that queries q, turned to n_local, from place `begin` on read: `(B, m)` int64 ascending."""
        vectors = self.index(memory, stream, self.units(begin))
        mean = ctx.layout.to_groups(q.to(vectors.dtype)).mean(3).sum(2)
        return pick_best((vectors @ mean.unsqueeze(-1)).squeeze(-1).sum(1), self.blocks)

    def retrieve(
        self, ctx: LayerContext, memory: BlockMemory, stream: Stream, q: Tensor, begin: int
    ) -> Callable[[], Retrieved] | None:
        if not self.units(begin):
            if memory.vectors is not None:
                memory.vectors.truncate(0)
                memory.recent.forget_from(0)
            return None
        inside = torch.arange(self.block, device=q.device) + self.n_init

        def load(rows: Tensor, _: Tensor, blocks: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
            places = blocks.unsqueeze(-1) * self.block + inside
            if stream.held:
                return stream.begin(rows, places)
            # where nothing lies on the host no token has to be looked for
            end = self.border(begin)
            keys, values = (x[:, :, self.n_init : end].unflatten(2, (-1, self.block))[rows, :, blocks] for x in (stream.k, stream.v))
            keys = keys if stream.rotary is None else turn(keys, -places.unsqueeze(1), stream.rotary)
            return lambda: (keys, values)

        begun = memory.recent.begin(self.choose(ctx, memory, stream, q, begin).unsqueeze(1), load)

        def finish() -> Retrieved:
            # (B, 1, blocks, Hk, block, D) to (B, Hk, tokens, D)
            return Retrieved(*(x.squeeze(1).transpose(1, 2).flatten(2, 3) for x in begun()))

        return finish


def _unturned(stream: Stream, places: Tensor, begin: int, end: int) -> Tensor:
    """Keys of the places begin ... end - 1 before the rotary embedding `(B, Hk, m, D)`; `places` are these numbers.

    Those that lie stored in full are cut out, where looking up single places asks the device which of them these are.
    """
    if begin < stream.held:
        return stream.unturned(places.expand(stream.k.shape[0], -1))[0]
    keys = stream.k[:, :, begin - stream.held : end - stream.held]
    return keys if stream.rotary is None else turn(keys, -places, stream.rotary)
