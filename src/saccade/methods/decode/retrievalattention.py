"""RetrievalAttention: all but the first and the newest keys lie on the host, where a graph made from the prompt's queries finds the few
that a query wants.

When a prompt has ended, its first `sinks` and last `window` tokens stay on the device; keys and values of the others move to the host. The
prompt's queries are linked to their nearest keys by inner product, this bipartite graph is projected onto the keys and the queries are
forgotten (see `saccade.parts.ann`). A step searches the graph of its key head, for each query head on its own, and merges

    (o_1, lse_1) over the `top_k` keys found, on the host      (o_2, lse_2) over the static and the generated tokens, on the device
    out = sum_i exp(lse_i - lse) o_i,      lse = log(exp(lse_1) + exp(lse_2))

exactly. Generated tokens are left in the growing part on the device until the next turn's prompt ends, which is offloaded with an index of
its own. Many tokens at a time read everything. Search and attention over what it finds run on the CPU.
Source: retrievalattention, arXiv 2409.10516.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.cache.offloaded import OffloadedSegment, OffloadedStore
from saccade.cache.stores import held, take
from saccade.core import CachePolicy, Decode, Info, LayerContext, Partial, Selection, StoredKV, merge, register
from saccade.ops import decode
from saccade.parts.ann import Found, KeyGraph, key_graph, search, stack_graphs
from saccade.parts.dots import dots
from saccade.parts.pick import pick_best, read_tokens

INDICES = ("roar", "flat", "faiss-hnsw")


class RetrievalSegment(OffloadedSegment):
    """An offloaded prompt and the index of its entries on the host; graph: on the CPU, None for the other kinds of index."""

    graph: KeyGraph | None = None
    _hnsw: list[Any] | None = None  # of each row and head, made when first searched

    @property
    def far(self) -> tuple[Tensor, Tensor]:
        """Keys and values on the host."""
        keys, values = self.parts[-1].keys, self.parts[-1].values
        assert isinstance(keys, OffloadedStore) and isinstance(values, OffloadedStore)
        return keys.host, values.host

    @property
    def host_bytes(self) -> int:
        return super().host_bytes + (0 if self.graph is None else held(*self.graph))

    def find(self, q: Tensor, kind: str, best: int, beam: int) -> Found:
        """The `best` keys for q `(B, Hq, D)` on the CPU, and how many were scored to find them (-1 where the library does not say)."""
        keys, _ = self.far
        if kind == "roar":
            assert self.graph is not None
            return search(q, keys, KeyGraph(self.graph.neighbours.cpu(), self.graph.entry.cpu()), best=best, beam=beam)
        if kind == "flat":
            return Found(pick_best(dots(q, keys), best), torch.full(q.shape[:2], keys.shape[2]))
        self._hnsw = [hnsw_index(head) for head in keys.flatten(0, 1)] if self._hnsw is None else self._hnsw
        groups = q.float().reshape(len(self._hnsw), -1, q.shape[-1])
        ids = []
        for index, rows in zip(self._hnsw, groups, strict=True):
            index.hnsw.efSearch = max(beam, best)
            ids.append(torch.from_numpy(index.search(rows.numpy(), best)[1]))
        found = torch.stack(ids).reshape(*q.shape[:2], best)
        # the library may find fewer: the gaps stand at the end
        return Found(found.masked_fill(found < 0, keys.shape[2]).sort(-1).values, torch.full(q.shape[:2], -1))

    def attend_found(self, q: Tensor, ids: Tensor, *, scale: float, softcap: float | None) -> Partial:
        """Attention of q `(B, Hq, 1, D)`, on the CPU, over the keys `ids (B, Hq, k)` on the host."""
        keys, values = self.far
        selection = read_tokens(ids, keys.shape[2])
        counts = (ids < keys.shape[2]).sum(-1, dtype=torch.int32).unsqueeze(2)
        selection = Selection(
            n_q=1, n_k=keys.shape[2], block_q=1, block_k=1, starts=selection.starts, start_counts=selection.start_counts,
            tokens=selection.tokens, token_counts=counts,
        )  # fmt: skip
        return decode(q, keys, values, selection, scale=scale, softcap=softcap, return_lse=True)

    def take_rows(self, rows: Tensor) -> RetrievalSegment:
        new = super().take_rows(rows)
        assert isinstance(new, RetrievalSegment)
        new.graph, new._hnsw = None if self.graph is None else KeyGraph(*(take(x, rows) for x in self.graph)), None
        return new

    def before(self, position: int) -> OffloadedSegment:
        """What loses entries loses its index, and is read in full."""
        new = super().before(position)
        if new.length == self.length:
            return new
        plain = OffloadedSegment(new.parts, self.begin)
        plain.row = self.row
        return plain

    def stored_fields(self) -> dict[str, Any]:
        """Without the library's index, which is made again from the keys."""
        return {**vars(self), "_hnsw": None}


def hnsw_index(keys: Tensor, degree: int = 32) -> Any:
    """faiss's HNSW graph over keys `(n, D)` by inner product; ValueError where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        raise ValueError("index='faiss-hnsw' needs faiss: pip install 'saccade[ann]', or use index='roar'") from None
    index = faiss.IndexHNSWFlat(keys.shape[1], degree, faiss.METRIC_INNER_PRODUCT)
    index.add(keys.float().contiguous().numpy())
    return index


@register
@dataclass(frozen=True, kw_only=True)
class RetrievalAttention(Decode, CachePolicy):
    """sinks, window: first and last tokens of a prompt that stay on the device. top_k: tokens retrieved per step and query head (up to
        2000 for hard key-value tasks). beam: keys that the search holds, ef; at least top_k are held anyway.
    index: "roar", the graph made from queries; "flat", all keys scored; "faiss-hnsw", a graph of keys alone by faiss (`saccade[ann]`).
    links: keys that a query is linked to. degree: edges that a key keeps of those, and half as many to near keys.
    query_stride: one prompt query in so many builds the index. Until the prompt has ended their queries are kept (attach with when="call"
        to have each layer's index made, and its queries forgotten, right after the layer's call).
    """

    sinks: int = 128
    window: int = 512
    top_k: int = 100
    beam: int = 128
    index: Literal["roar", "flat", "faiss-hnsw"] = "roar"
    links: int = 32
    degree: int = 32
    query_stride: int = 1

    info = Info(
        slug="retrievalattention", phase="decode", also=frozenset({"cache"}), needs=frozenset({"queries"}), frees_memory=True,
        append_only=False, encodes=True, opened={"top_k": 1 << 30},
        tiny={"sinks": 2, "window": 8, "top_k": 8, "beam": 12, "links": 8, "degree": 6},
        opts_out={"stepwise": "acts when a prompt has ended, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        least = {"sinks": 0, "window": 0, "links": 2, "degree": 2}
        for name in ("sinks", "window", "top_k", "beam", "links", "degree", "query_stride"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1):
                raise ValueError(f"retrievalattention({name}={value!r}) is not a whole number of at least {least.get(name, 1)}")
        if self.index not in INDICES:
            raise ValueError(f"retrievalattention(index={self.index!r}) is not one of {', '.join(INDICES)}")

    # -- the prompt --------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        """Keep a prompt's queries, those of tokens 0, query_stride, 2 query_stride, ...; nothing is indexed step by step."""
        if self.index != "roar":
            return
        begin, stride = ctx.seen - q.shape[2], self.query_stride
        if q.shape[2] == 1 and begin:
            return
        kept, first = ctx.state.get("queries"), ctx.state.get("first", 0)
        chosen = q[:, :, -begin % stride :: stride]
        if kept is None or begin < first:
            ctx.state["queries"], ctx.state["first"] = chosen.clone(), begin
            return
        # queries of tokens that were taken back go
        ctx.state["queries"] = torch.cat([kept[:, :, : self._until(begin) - self._until(first)], chosen], dim=2)

    def _until(self, place: int) -> int:
        """How many tokens before `place` have their queries kept."""
        return -(-place // self.query_stride)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        queries, first = ctx.state.pop("queries", None), ctx.state.pop("first", 0)
        begin, end = ctx.seen - kv.length, kv.length - self.window
        near = self.sinks if begin == 0 else 0
        if end - near < 1:
            return
        keys, values = kv.keys[:, :, :end], kv.values[:, :, :end]
        side = {"positions": kv.side["positions"][:, :, :end]}
        segment = RetrievalSegment.of(keys, values, side, begin=begin, near=near)
        assert isinstance(segment, RetrievalSegment)
        if self.index == "roar":
            q = keys.new_zeros(keys.shape[0], ctx.layout.query_heads, 0, keys.shape[-1]) if queries is None else queries
            q = q[:, :, : self._until(ctx.seen) - self._until(first)]
            grouped = ctx.layout.to_groups(q).flatten(2, 3).flatten(0, 1)
            far = keys[:, :, near:].flatten(0, 1)
            graphs = [key_graph(k, rows, degree=self.degree, links=self.links) for k, rows in zip(far, grouped, strict=True)]
            segment.graph = KeyGraph(*(x.cpu() for x in stack_graphs(graphs, tuple(keys.shape[:2]))))
        kv.seal(segment, end)

    # -- decoding ----------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        """Of what stands on the device, everything; `RetrievalSegment.find` says what is read of the host's."""
        return Selection.full(q.shape[2], k.shape[2], block_q=1, block_k=k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [ctx.partial(q, k, v, None)] if k.shape[2] else []
        for segment in ctx.segments:
            n = segment.parts[-1].keys.length
            if not isinstance(segment, RetrievalSegment) or self.top_k >= n:
                ctx.count(segment.length)
                parts.append(segment.attend(q, scale=ctx.scale, softcap=ctx.softcap))
                continue
            here = q.cpu()
            found = segment.find(here.squeeze(2), self.index, self.top_k, self.beam)
            over = segment.attend_found(here, found.ids, scale=ctx.scale, softcap=ctx.softcap)
            assert over.lse is not None
            parts.append(Partial(over.out.to(q.device), over.lse.to(q.device)))
            near = [part.attend(q, scale=ctx.scale, softcap=ctx.softcap) for part in segment.parts[:-1]]
            parts.extend(near)
            # a score that only chooses is half of a pair: the values are not read
            ctx.count(self.top_k + float(found.scanned.clamp(min=0).double().mean()) / 2 + segment.length - n)
        return merge(*parts).out if parts else ctx.attend(q, k, v, None)
