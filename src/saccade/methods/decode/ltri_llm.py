"""Ltri-LLM: a sliding window, and a memory whose units are the semantic spans that show as triangles in the local attention map.

The stream is cut in stretches of L tokens. In the map A of a stretch (the attention of its tokens among themselves, as shares of what they
give to the window, the mean over heads) the spans are those of `saccade.parts.spans`. A span is known by some of its keys, those that
receive most attention inside it. For a chunk of queries, with a_h the mean query of head h turned to the place n_local and w_h the weight
of head h,

    vote(span) = sum_h w_h softmax_spans(max over the span's keys of scale a_h.k)_h / sum_h w_h
    score(span) = vote + layer_share * (votes of the layers before, mean over the span's tokens)
                       + sum_{i = 1}^{persist} decay^i (the span's vote i chunks or steps ago, if it was read then)

and spans are read by all heads, highest score first, as long as they fit in the budget. Window, first tokens, the fixed distance of far
tokens and storage are those of `saccade.methods.streaming`, as in infllm.

Source: ltri-llm, arXiv 2412.04757. Inferred, for the paper leaves them open and there is no official code: the stretches, theta
(the mean of A over the entries that spans can cover), the formulas of votes, persistence and confidence; layers vote in one direction,
upwards, because lower layers have been computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.cache.stores import take
from saccade.cache.stream import Stream
from saccade.core import Info, LayerContext, register
from saccade.methods.streaming import FarMemory, Retrieved
from saccade.parts.followers import SLACK, RecentRows
from saccade.parts.growing import Growing
from saccade.parts.lists import hits
from saccade.parts.probe import row_probabilities
from saccade.parts.rows import pick_rows
from saccade.parts.spans import confidence, inner_attention, span_starts, triangle_scores

REMEMBERED = 16  # spans of a step whose votes persist


class SpanMemory:
    """queries `(B, Hq, w, D)` by place, for the map of the next stretch. vectors `(B, Hk, spans, R, D)`: keys that stand for each span.
    table `(B, 1, spans, 3)` int64: where a span begins and ends, and how many vectors it has; rows with fewer spans are filled up with
    empty ones. ends: spans up to each stretch's end. history: place, spans `(B, m)` and their votes of the last chunks."""

    def __init__(self, queries: RecentRows) -> None:
        self.queries = queries
        self.vectors: Growing | None = None
        self.table: Growing | None = None
        self.ends: list[int] = []
        self.history: list[tuple[int, Tensor, Tensor]] = []

    @property
    def nbytes(self) -> int:
        return self.queries.nbytes + sum(x.nbytes for x in (self.vectors, self.table) if x is not None)

    def append(self, vectors: Tensor, table: Tensor) -> None:
        """The spans of the next stretch."""
        if self.vectors is None or self.table is None:
            self.vectors, self.table = Growing(vectors), Growing(table)
        else:
            self.vectors.append(vectors)
            self.table.append(table)
        self.ends.append(self.table.n)

    def forget(self, stretches: int, place: int) -> None:
        """Keep the spans of the first stretches, and what happened before `place`."""
        self.ends = self.ends[:stretches]
        for x in (self.vectors, self.table):
            if x is not None:
                x.truncate(self.ends[-1] if self.ends else 0)
        self.history = [step for step in self.history if step[0] < place]

    def reorder(self, rows: Tensor) -> SpanMemory:
        """A copy with these batch rows."""
        new = SpanMemory(self.queries.reorder(rows))
        new.vectors, new.table = (None if x is None else x.reorder(rows) for x in (self.vectors, self.table))
        new.ends = list(self.ends)
        new.history = [(place, take(ids, rows), take(votes, rows)) for place, ids, votes in self.history]
        return new


@register
@dataclass(frozen=True, kw_only=True)
class LtriLLM(FarMemory):
    """n_local, n_init, chunk: the window, the first keys and the queries that share a retrieval.
    stretch: tokens L that are cut into spans together. longest: tokens of a span at most. theta: attention that a span must exceed on
        average; None: the mean of the map over the entries that spans can cover. iou: overlap beyond which the worse of two spans goes.
    vectors: keys R that stand for a span at most. index: "static": R; "dynamic": R (1 - confidence), rounded up, confidence being a
        span's triangle score relative to its neighbours'.
    budget: retrieved tokens at most. persist: chunks or steps for which a vote lasts; decay: what is left of it from one to the next.
    layer_share: weight of the votes of the layers before. retrieval_heads: (layer, query head) pairs of known retrieval heads, whose votes
        weigh `boost` times as much.
    """

    stretch: int = 512
    longest: int = 64
    theta: float | None = None
    iou: float = 0.4
    vectors: int = 4
    index: Literal["static", "dynamic"] = "static"
    budget: int = 2048
    persist: int = 4
    decay: float = 0.5
    layer_share: float = 0.5
    retrieval_heads: tuple[tuple[int, int], ...] = ()
    boost: float = 4.0

    info = Info(
        slug="ltri-llm", phase="prefill", also=frozenset({"decode", "cache"}), needs=frozenset({"queries"}), frees_memory=True,
        append_only=False, encodes=True, opened={"n_local": 1 << 30},
        tiny={"n_local": 16, "n_init": 2, "chunk": 8, "stretch": 8, "longest": 6, "vectors": 2, "budget": 12},
        opts_out={
            "chunked": "chunks that share a retrieval are counted from the first query given, so calls cut them elsewhere",
            "stepwise": "the queries of a prompt's chunk share a retrieval, single tokens have their own",
            "future": "the queries of a chunk choose spans together; values after a row never reach it",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        self.check_window()
        for name, least in (("stretch", 1), ("longest", 1), ("vectors", 1), ("budget", 1), ("persist", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"ltri-llm({name}={value!r}) is not a whole number of at least {least}")
        for name, most in (("iou", 1), ("decay", 1), ("layer_share", 1), ("boost", 1e6), ("theta", 1)):
            value = getattr(self, name)
            if name == "theta" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise ValueError(f"ltri-llm({name}={value!r}) is not a number from 0 to {most:g}")
        if self.longest > min(self.stretch, self.budget):
            raise ValueError(f"ltri-llm(longest={self.longest}) is more than a stretch ({self.stretch}) or the budget ({self.budget})")
        if self.index not in ("static", "dynamic"):
            raise ValueError(f"ltri-llm(index={self.index!r}) is neither 'static' nor 'dynamic'")

    @property
    def unit(self) -> int:
        return self.stretch

    def fresh(self) -> SpanMemory:
        return SpanMemory(RecentRows(self.stretch + self.chunk))

    # -- spans -------------------------------------------------------------------------------------------------------------

    def take_in(self, ctx: LayerContext, memory: SpanMemory, stream: Stream, q: Tensor, begin: int) -> None:
        if self.n_local >= 1 << 24:
            return  # with a window that nothing ever leaves, no span will be asked for
        # what was known of places from `begin` on was taken back
        memory.forget(max(0, (begin - self.n_init) // self.stretch), begin + 1)
        memory.queries.append(q, begin)
        while (start := self.n_init + len(memory.ends) * self.stretch) + self.stretch <= begin + q.shape[2]:
            memory.append(*self._spans(ctx, memory, stream, start))

    def _spans(self, ctx: LayerContext, memory: SpanMemory, stream: Stream, start: int) -> tuple[Tensor, Tensor]:
        """Vectors and table of the spans of the stretch from `start` on."""
        end = start + self.stretch
        places = torch.arange(start, end, device=stream.k.device)
        queries = memory.queries.part(start, end)
        attention = stream.k.new_zeros(stream.k.shape[0], self.stretch, self.stretch, dtype=torch.float64)
        if queries is not None:
            low = max(0, min(start, end - self.n_local))
            keys, _ = stream.turned(low, end)
            rows = torch.arange(self.stretch, device=keys.device)
            found = row_probabilities(queries, keys, rows, scale=ctx.scale, softcap=ctx.softcap)
            attention = found[..., start - low :].to(torch.float64).mean(1)
        cut = [self.cut(row) for row in attention]
        most = max(len(starts) for starts, *_ in cut)
        table = torch.zeros(len(cut), 1, most, 3, dtype=torch.int64, device=places.device)
        picked = torch.zeros(len(cut), most, self.vectors, dtype=torch.int64, device=places.device)
        for b, (starts, ends, counts, tokens) in enumerate(cut):
            table[b, 0, : len(starts)] = torch.stack([starts + start, ends + start, counts], dim=-1)
            picked[b, : len(starts), : tokens.shape[1]] = tokens
        keys, _ = stream.unturned(places.expand(len(cut), -1))
        exact = keys.to(torch.promote_types(keys.dtype, torch.float32))
        vectors = pick_rows(exact, picked.flatten(1).unsqueeze(1).expand(-1, keys.shape[1], -1))
        return vectors.unflatten(2, (most, self.vectors)), table

    def cut(self, attention: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Spans of a map `(n, n)`: starts, ends and numbers of vectors `(spans,)` int64, and the tokens of these `(spans, up to R)`."""
        n = attention.shape[0]
        within = torch.ones_like(attention).tril().triu(-self.longest + 1)
        theta = float((attention * within).sum() / within.sum()) if self.theta is None else self.theta
        scores = triangle_scores(attention, theta, self.longest)
        starts = span_starts(scores, self.iou).nonzero().squeeze(-1)
        ends = torch.cat([starts[1:], starts.new_tensor([n])])
        counts = (ends - starts).clamp(max=self.vectors)
        if self.index == "dynamic":
            unsure = 1 - confidence(scores[starts, ends - starts - 1])
            counts = torch.minimum(counts, (self.vectors * unsure).ceil().long().clamp(min=1))
        received = inner_attention(attention, starts, ends)
        tokens = torch.sort(received, dim=-1, descending=True, stable=True).indices[:, : self.vectors]
        return starts, ends, counts, tokens

    # -- retrieval ---------------------------------------------------------------------------------------------------------

    def votes(self, ctx: LayerContext, memory: SpanMemory, q: Tensor, spans: int) -> Tensor:
        """The heads' votes for the first spans, `(B, spans)`, which sum to 1."""
        assert memory.vectors is not None and memory.table is not None
        vectors, table = memory.vectors.view[:, :, :spans], memory.table.view[:, 0, :spans]
        mean = ctx.layout.to_groups(q.to(vectors.dtype)).mean(3)
        logits = torch.einsum("bhgd,bhsrd->bhgsr", mean, vectors) * ctx.scale
        absent = torch.arange(self.vectors, device=q.device) >= table[..., 2:]
        shares = logits.masked_fill(absent[:, None, None], -torch.inf).amax(-1).flatten(1, 2).softmax(-1)
        weights = torch.ones(shares.shape[1], dtype=shares.dtype, device=q.device)
        for layer, head in self.retrieval_heads:
            if layer == ctx.layer and head < len(weights):
                weights[head] = self.boost
        return (shares * weights.unsqueeze(-1)).sum(1) / weights.sum()

    def choose(self, ctx: LayerContext, memory: SpanMemory, q: Tensor, begin: int) -> Tensor:
        """Which of the tokens n_init ... border queries q, turned to n_local, from place `begin` on read: bool `(B, tokens)`."""
        count, spans = self.units(begin) * self.stretch, memory.ends[self.units(begin) - 1]
        assert memory.table is not None
        table = memory.table.view[:, 0, :spans]
        first, last = table[..., 0] - self.n_init, table[..., 1] - self.n_init
        lengths = last - first
        first, last = first.clamp(min=0), last.clamp(min=0)  # empty spans
        own = self.votes(ctx, memory, q, spans)
        score = own.clone()
        name = f"ltri-llm {begin}"
        carried = ctx.shared.get(name)
        if carried is not None:
            sums = torch.nn.functional.pad(carried.cumsum(-1), (1, 0))
            score += self.layer_share * (sums.gather(-1, last) - sums.gather(-1, first)) / lengths.clamp(min=1)
        memory.history = [step for step in memory.history if step[0] < begin]
        for i, (_, ids, votes) in enumerate(reversed(memory.history[-self.persist :] if self.persist else []), start=1):
            score.scatter_add_(-1, ids, self.decay**i * votes)
        spread = _over_tokens(own, first, last, count)
        ctx.shared[name] = spread if carried is None else spread + self.layer_share * carried
        order = torch.sort(score.masked_fill(lengths == 0, -torch.inf), dim=-1, descending=True, stable=True).indices
        sizes = lengths.gather(-1, order)
        taken = (sizes.cumsum(-1) <= self.budget) & (sizes > 0)
        best = order[:, :REMEMBERED]
        memory.history.append((begin, best, own.gather(-1, best) * taken[:, :REMEMBERED]))
        memory.history = memory.history[-(self.persist + SLACK) :]
        return _over_tokens(torch.zeros_like(own).scatter(-1, order, taken.to(own.dtype)), first, last, count) > 0.5

    def retrieve(
        self, ctx: LayerContext, memory: SpanMemory, stream: Stream, q: Tensor, begin: int
    ) -> Callable[[], Retrieved] | None:
        if not self.units(begin):
            return None
        chosen = self.choose(ctx, memory, q, begin)
        ids = hits(chosen).long()
        valid = ids < chosen.shape[1]
        rows = torch.arange(q.shape[0], device=q.device)
        finish = stream.begin(rows, ids.masked_fill(~valid, 0) + self.n_init)
        return lambda: Retrieved(*finish(), None if bool(valid.all()) else valid)


def _over_tokens(values: Tensor, first: Tensor, last: Tensor, count: int) -> Tensor:
    """Each token's value, that of its span: values `(B, spans)` of the tokens first ... last - 1 to `(B, count)`."""
    change = values.new_zeros(values.shape[0], count + 1, dtype=torch.float64)
    change.scatter_add_(-1, first, values.to(torch.float64)).scatter_add_(-1, last, -values.to(torch.float64))
    return change.cumsum(-1)[:, :-1]
