"""HiP: a beam search over a binary tree of key ranges finds each query block's keys in O(log N) scores for each key kept.

    ranges  [floor(j N / K), floor((j + 1) N / K))  of the N key blocks before the window, j = 0 ... K - 1
    until every range is one block: split each at its middle, score each half by its middle block,
        s = max over sampled rows and keys of q.k,   and keep the K best halves
    out     one softmax over the first `sinks` keys, the K blocks that are left, and the sliding window

In a prompt the search is made for every block of queries. In decoding it is made for single queries, every `refresh` steps; in between
the blocks found last are read again, next to a window that grows until the next search, so that no key falls between the two.
The greedy descent finds keys whose neighbours score high too: a lone needle may be lost, which is why the first layers are dense and why
dense prefill with HiP in decoding retrieves best.

Source: hip, arXiv 2406.09827, sections 3.2 and 3.3 and algorithm 1; window and sinks as in its released version 1.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Decode, Info, LayerContext, Prefill, Selection, register
from saccade.core.method import LayerPolicy
from saccade.ops.estimate import descend_tree
from saccade.parts.lists import KeyLists, open_rows, run_tiles, tile_ends


@register
@dataclass(frozen=True, kw_only=True)
class HiP(Prefill, Decode):
    """Keys are chosen for each query head; `attach(model, prefill="hip")`, or `decode="hip"`, or both.

    top_k: keys the search keeps, tokens. block_q: queries that share a choice; one in stride_q of them scores. block_k: keys that are kept
    together; one in stride_k of them is scored. window: last keys that every query reads, itself included.
    sinks: first keys that every query reads. dense_layers: the first layers, which read everything. dense_rows: last rows of a prompt,
    rounded up to whole blocks, that read everything (0 in the paper). refresh: decoding steps that share one choice, r_m.
    """

    top_k: int = 512
    block_q: int = 64
    stride_q: int = 2
    block_k: int = 2
    stride_k: int = 1
    window: int = 256
    sinks: int = 16
    dense_layers: int = 3
    dense_rows: int = 0
    refresh: int = 8

    info = Info(
        slug="hip", phase="prefill", opened={"top_k": 1 << 30},
        tiny={"top_k": 16, "block_q": 16, "window": 12, "sinks": 2, "dense_layers": 0, "refresh": 3},
        opts_out={
            "chunked": "blocks of queries are counted from the first query given, so chunks cut them elsewhere",
            "stepwise": "a block of a prompt's queries chooses together, single tokens are decoded densely or choose alone",
            "future": "rows of a block share one choice that the later rows take part in; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        least = {"sinks": 0, "dense_layers": 0, "dense_rows": 0}
        for name in ("top_k", "block_q", "stride_q", "block_k", "stride_k", "window", "sinks", "dense_layers", "dense_rows", "refresh"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1):
                raise ValueError(f"hip({name}={value!r}) is not a whole number of at least {least.get(name, 1)}")
        for stride, block in (("stride_q", "block_q"), ("stride_k", "block_k")):
            if getattr(self, stride) > getattr(self, block):
                raise ValueError(f"hip({stride}={getattr(self, stride)}) is more than {block}={getattr(self, block)}: give less or equal")
        if self.top_k < self.block_k:
            raise ValueError(f"hip(top_k={self.top_k}) is less than one block of {self.block_k} keys")

    # -- a prompt ----------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        if ctx.phase == "decode":
            return self._step(ctx, q, k)
        n_q, n_k = q.shape[2], k.shape[2]
        ends = tile_ends(n_q, n_k, self.block_q)
        searched = self._searched(ends - self.block_q)
        # a block that is not full is filled up with its last row
        whole = torch.nn.functional.pad(q, (0, 0, 0, -n_q % self.block_q))
        whole[:, :, n_q:] = q[:, :, -1:]
        rows = whole.unflatten(2, (-1, self.block_q))[:, :, :, :: self.stride_q]
        found = self._search(rows, k, searched)
        begins = (self.sinks + searched * self.block_k).clamp(min=self.sinks)
        lists = self._lists(found, searched, begins, ends.clamp(max=n_k), n_k)
        if self.dense_rows:
            lists = open_rows(lists, n_q=n_q, n_k=n_k, last=self.dense_rows, block=self.block_q)
        return lists.selection(n_q=n_q, n_k=n_k, block=self.block_q)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ctx.phase == "decode":
            return Decode.attend(self, ctx, q, k, v)
        if q.shape[2] == 1 or ctx.layer < self.dense_layers or k.shape[2] <= self.sinks + self.top_k + self.window:
            return ctx.attend(q, k, v, None)
        return ctx.attend(q, k, v, self.select(ctx, q, k, v))

    def _searched(self, positions: Tensor) -> Tensor:
        """Blocks between the sinks and the window of the query at each position, int64.

        Lengths alone decide: this and the bounds below are on the CPU, where asking for their values waits for no kernel.
        """
        return torch.div(positions - self.window + 1 - self.sinks, self.block_k, rounding_mode="floor").clamp(min=0)

    def _search(self, rows: Tensor, k: Tensor, searched: Tensor) -> Tensor:
        """Blocks found for each query tile, `(B, Hq, T, K)` int64 ascending, past the end `searched[-1]`."""
        keep = min(self.top_k // self.block_k, max(1, int(searched[-1])))
        return descend_tree(rows, k, searched, keep, first=self.sinks, block=self.block_k, stride=self.stride_k)

    def _lists(self, found: Tensor, searched: Tensor, begins: Tensor, ends: Tensor, n_k: int) -> KeyLists:
        """Sinks and found blocks as single keys, the window from `begins (T,)` to `ends (T,)` as tiles."""
        starts = run_tiles(begins, ends, self.block_q, n_k)
        starts, searched, ends = (x.to(found.device, non_blocking=True) for x in (starts, searched, ends))
        units = (found.unsqueeze(-1) * self.block_k + self.sinks + torch.arange(self.block_k, device=found.device)).flatten(3)
        real = found < searched.view(-1, 1)
        units = units.masked_fill(~real.repeat_interleave(self.block_k, -1), n_k)
        sinks = torch.arange(min(self.sinks, n_k), device=found.device)
        sinks = torch.where(sinks < ends.unsqueeze(-1), sinks, n_k).expand(*found.shape[:3], -1)
        # a tile that ends among the sinks has found nothing, so the list stays ascending
        tokens = torch.cat([sinks, units], dim=-1).to(torch.int32)
        return KeyLists(starts.expand(*found.shape[:3], -1), tokens)

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def layer_policy(self, layer: int, layers: int) -> LayerPolicy:
        return "dense" if layer < self.dense_layers else "select"

    def rewind(self, ctx: LayerContext, n: int) -> int:
        if ctx.state.get("searched at", 0) > n:
            ctx.state.pop("found", None)
        return n

    def _step(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Selection:
        n = k.shape[2]
        if "found" not in ctx.state or n // self.refresh > ctx.state["searched at"] // self.refresh:
            searched = self._searched(torch.tensor([n - 1]))
            ctx.state["found"] = self._search(q.unsqueeze(2), k, searched)
            ctx.state["searched at"] = n
        searched = self._searched(torch.tensor([ctx.state["searched at"] - 1]))
        begins = self.sinks + searched * self.block_k
        lists = self._lists(ctx.state["found"], searched, begins, torch.tensor([n]), n)
        return lists.selection(n_q=1, n_k=n, block=self.block_q)
