"""STILL: the most salient tokens of every chunk stay exact for good, the others become a linear state, under one denominator.

    chunks of l tokens; token j of a closed chunk is salient if s_j is among the m largest of its chunk
    s_t = KL(P || P'),   P: softmax of q_t over the last l keys, P' the same without its own key       (parts.linear.self_saliency)
    a query of chunk c reads by softmax: salient tokens of chunks <= c - 2, chunk c - 1, and its own chunk up to itself;
                       through phi:      the other tokens of chunks <= c - 2

    y_t = (sum_exact e^(l_tj - m_t) v_j + g_t * phi_q(q_t) S) / (sum_exact e^(l_tj - m_t) + phi_q(q_t).z + 1e-6)
    l_tj = q_t . k_j D^-1/2,   m_t = max over the exact part,   g = sigmoid(W_g x) per channel
    phi(x) = [softmax(x^), softmax(-x^)],   x^ of the length of x, its direction mirrored and mapped     (parts.linear.norm_map)

Saliency, maps and sums are those of every query head. A chunk's tokens are parted when the chunk after it has closed: until then they lie
in a ring of the last 2 l - 1 tokens. m = l keeps all: softmax attention. The layer is taught as lolcats is, by `saccade.train.convert`.

Source: still, arXiv 2602.02180.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from saccade.cache.kv_store import KVStore
from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.softmax import Softmax, SoftmaxMixer
from saccade.parts.linear.features import FeatureMap, Hedgehog
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.norm_map import NormPreserving
from saccade.parts.linear.partial import PartialSoftmax, shared_denominator
from saccade.parts.linear.self_saliency import most_salient, self_saliency
from saccade.parts.linear.tokens import last_tokens

Map = Literal["np", "hedgehog"]
EPS = 1e-6  # in the denominator, as published
AT_ONCE = 1024  # queries of whole chunks that are computed together


@register
@dataclass(frozen=True, kw_only=True)
class Still(Mixer):
    """chunk: l, tokens of a chunk. kept: m, its tokens that stay exact; default l / 16, at least 1. feature_map: "np" keeps the length of
    queries and keys, "hedgehog" does not. gate: weigh what the linear part reads by g. rotary, theta, bias: of the projections, as those
    of the model that is converted."""

    chunk: int = 64
    kept: int | None = None
    feature_map: Map = "np"
    gate: bool = True
    rotary: bool = True
    theta: float = 10000.0
    bias: bool = False

    info = Info(
        slug="still", phase="mixer", needs=frozenset({"training"}), tiny={"chunk": 8, "kept": 2},
        variants=(
            {"chunk": 5, "kept": 0, "rotary": False, "bias": True}, {"chunk": 8, "kept": 8}, {"chunk": 16, "feature_map": "hedgehog"},
            {"chunk": 1, "kept": 1, "gate": False},
        ),
        opts_out={"constant": "the salient tokens of every chunk are kept"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.chunk < 1 or (self.kept is not None and not 0 <= self.kept <= self.chunk):
            raise ValueError(f"chunk={self.chunk}, kept={self.kept}: give at least 1 token a chunk, of which from 0 to all are kept")
        if self.feature_map not in get_args(Map):
            raise ValueError(f"feature_map={self.feature_map!r} is not one of {', '.join(get_args(Map))}")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        return StillMixer(shape, self)


class Span(NamedTuple):
    """Tokens that are computed together: `count` chunks from number `chunk` on, of each the `rows` tokens from `offset` on; `begin`, `end`
    in the call."""

    begin: int
    end: int
    chunk: int
    offset: int
    count: int
    rows: int


def spans(start: int, n: int, size: int) -> Iterator[Span]:
    """The n tokens of a call behind `start` others: whole chunks together, but never the first chunk of the sequence with others."""
    at = 0
    while at < n:
        chunk, offset = divmod(start + at, size)
        whole = (n - at) // size
        if offset or not chunk or not whole:
            count, rows = 1, min(size - offset, n - at)
        else:
            count, rows = min(whole, max(1, AT_ONCE // size)), size
        yield Span(at, at + count * rows, chunk, offset, count, rows)
        at += count * rows


class StillMixer(SoftmaxMixer):
    """The layer: softmax attention's projections, maps and the gate beside them."""

    batches_padding = False

    def __init__(self, shape: MixerShape, method: Still) -> None:
        super().__init__(shape, Softmax(rotary=method.rotary, theta=method.theta, bias=method.bias))
        self.chunk, self.kept = method.chunk, max(1, method.chunk // 16) if method.kept is None else method.kept
        self.q_map, self.k_map = (_map(method, shape) for _ in range(2))
        self.gate = nn.Linear(shape.dim, shape.heads * shape.head_dim, bias=False) if method.gate else None

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        wide = torch.promote_types(x.dtype, torch.float32)
        size, start, n = self.chunk, int(call.start[0]), x.shape[1]
        ring = 2 * size - 1
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        new = {"k": k.transpose(1, 2), "v": v.transpose(1, 2), "score": q.new_zeros(*x.shape[:2], self.heads, dtype=wide)}
        held = {name: past[name].to(t.dtype) if past else t.new_zeros(t.shape[0], ring, *t.shape[2:]) for name, t in new.items()}
        tokens = {name: torch.cat([held[name], t], dim=1) for name, t in new.items()}  # the call's begin at `ring`
        state = past["s"] if past else q.new_zeros(*q.shape[:2], self.q_map.width(q.shape[-1]), q.shape[-1] + 1, dtype=wide)
        store = past["salient"] if past else KVStore()
        far = _held(store, k.new_zeros(k.shape[0], self.heads, 0, k.shape[3]))
        already, outs = far[0].shape[2], []
        for span in spans(start, n, size):
            low = (span.chunk - 1) * size - start + ring
            out, far, state = self._span(q[:, :, span.begin : span.end], tokens, low, span, far, state)
            outs.append(out)
        gate = self._gate(x)
        exact = PartialSoftmax(*(torch.cat(parts, dim=2) for parts in zip(*(out[0] for out in outs), strict=True)))
        read = torch.cat([out[1] for out in outs], dim=2)
        y = shared_denominator(exact, read[..., :-1], read[..., -1:], value_factor=gate, eps=EPS)
        kept: dict[str, Any] = {}
        if call.keep:
            if far[0].shape[2] > already:
                store.append(far[0][:, :, already:], far[1][:, :, already:], None)
            kept = {name: last_tokens(tokens[name][:, :ring], tokens[name][:, ring:], None) for name in tokens}
            kept |= {"s": state, "salient": store}
        return self.finish(y.to(x.dtype), x), kept

    def _span(
        self, q: Tensor, tokens: dict[str, Tensor], low: int, span: Span, far: tuple[Tensor, Tensor], state: Tensor
    ) -> tuple[tuple[PartialSoftmax, Tensor], tuple[Tensor, Tensor], Tensor]:
        """What the queries `(B, H, count * rows, D)` of a span read, exactly and from the sums; the salient tokens and sums behind it.

        low: where the chunk before the span begins in `tokens`; the scores of the span's own tokens are written there.
        """
        size, count, rows = self.chunk, span.count, span.rows
        wide = torch.promote_types(q.dtype, torch.float32)
        width = size + span.offset + rows
        near_k, near_v = (
            tokens[name][:, low : low + (count - 1) * size + width].unfold(1, width, size).permute(0, 2, 1, 4, 3).to(wide) for name in "kv"
        )  # (B, Hk, count, width, D): the chunk before and the own one, up to the last query
        slot, row = torch.arange(width, device=q.device), torch.arange(rows, device=q.device)[:, None] + size + span.offset
        seen = (slot <= row) & (slot >= (size if span.chunk == 0 else 0))
        scaled = (q.to(wide) * q.shape[-1] ** -0.5).unflatten(2, (count, rows))
        near = _grouped(scaled, near_k.mT).masked_fill(~seen, float("-inf"))
        # saliency reads the last `size` keys
        scores = self_saliency(near.masked_fill(slot <= row - size, float("-inf")), slot == row, size)
        place = low + size + span.offset
        tokens["score"][:, place : place + count * rows] = scores.detach().flatten(2, 3).transpose(1, 2)

        before, states = far[0].shape[2], state.unsqueeze(2)
        if span.chunk and span.offset + rows == size:
            # the chunks before those of the span: each is parted for the queries of the second chunk after it
            closing = slice(low, low + count * size)
            chosen, sums = self._part({name: t[:, closing] for name, t in tokens.items()}, count, wide)
            far = (torch.cat([far[0], chosen[0]], 2), torch.cat([far[1], chosen[1]], 2))
            states = torch.cat([states, states + sums.cumsum(2)], dim=2)
        place = torch.arange(far[0].shape[2], device=q.device) - before
        visible = place < self.kept * torch.arange(count, device=q.device)[:, None, None]
        distant = (scaled.flatten(2, 3) @ far[0].to(wide).mT).unflatten(2, (count, rows)).masked_fill(~visible, float("-inf"))

        logits = torch.cat([near, distant], dim=-1)
        # what is read from the sums is not divided by e^top: its gradient counts
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top).exp()
        value = _grouped(weights[..., :width], near_v).flatten(2, 3) + weights[..., width:].flatten(2, 3) @ far[1].to(wide)
        exact = PartialSoftmax(top.flatten(2, 3), weights.sum(-1, keepdim=True).flatten(2, 3), value)
        read = self.q_map(q).to(wide).unflatten(2, (count, rows)) @ states[:, :, :count]
        return (exact, read.flatten(2, 3)), far, states[:, :, -1]

    def _part(self, closing: dict[str, Tensor], count: int, wide: torch.dtype) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Salient keys and values `(B, H, count * kept, D)` of `count` chunks, and what the others of each add to the sums."""
        group = self.heads // self.kv_heads
        k, v = (closing[name].transpose(1, 2).repeat_interleave(group, dim=1).unflatten(2, (count, -1)) for name in "kv")
        chosen = most_salient(closing["score"].transpose(1, 2).unflatten(2, (count, -1)), self.kept)
        index = chosen.unsqueeze(-1).expand(*chosen.shape, k.shape[-1])
        rest = torch.ones(k.shape[:-1], dtype=torch.bool, device=k.device).scatter(-1, chosen, False)
        phi = self.k_map(k.flatten(2, 3)).to(wide).unflatten(2, (count, -1)).masked_fill(~rest.unsqueeze(-1), 0.0)
        ones = torch.cat([v.to(wide), torch.ones_like(v[..., :1], dtype=wide)], dim=-1)
        return (k.gather(3, index).flatten(2, 3), v.gather(3, index).flatten(2, 3)), phi.mT @ ones

    def naive(self, x: Tensor) -> Tensor:
        call, group = self.whole(x), self.heads // self.kv_heads
        wide = torch.promote_types(x.dtype, torch.float32)
        q, (k, v) = self.queries(x, call), self.keys(x, call)
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        cheap = self.q_map(q).to(wide) @ self.k_map(k).to(wide).mT
        q, k, v = (t.to(wide) for t in (q, k, v))
        logits = q @ k.mT * q.shape[-1] ** -0.5
        exact, linear = self.coverage(logits)
        near = logits.masked_fill(~exact, float("-inf"))
        weights = (near - near.amax(-1, keepdim=True)).exp()
        cheap = cheap * linear
        total = weights.sum(-1, keepdim=True) + cheap.sum(-1, keepdim=True) + EPS
        return self.finish(((weights @ v + self._gate(x) * (cheap @ v)) / total).to(x.dtype), x)

    def coverage(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Which of all N tokens each query reads exactly, and which from the sums, `(B, H, N, N)` bool, of scaled logits of that shape."""
        n, size = logits.shape[-1], self.chunk
        i, j = torch.arange(n, device=logits.device)[:, None], torch.arange(n, device=logits.device)
        band = (j <= i) & (j > i - size)
        scores = self_saliency(logits.masked_fill(~band, float("-inf")), i == j, size)
        closed = n // size * size
        salient = torch.zeros_like(scores, dtype=torch.bool)
        if closed:
            chosen = most_salient(scores[..., :closed].unflatten(-1, (-1, size)), self.kept)
            marked = salient[..., :closed].unflatten(-1, (-1, size)).scatter(-1, chosen, True)
            salient[..., :closed] = marked.flatten(-2)
        near = i // size - j // size < 2
        exact = (j <= i) & (near | salient.unsqueeze(-2))
        return exact, (j <= i) & ~exact

    def _gate(self, x: Tensor) -> Tensor | float:
        if self.gate is None:
            return 1.0
        return heads_first(self.gate(x).to(torch.promote_types(x.dtype, torch.float32)).sigmoid(), self.heads)


def _map(method: Still, shape: MixerShape) -> FeatureMap:
    return (NormPreserving if method.feature_map == "np" else Hedgehog)(shape.heads, shape.head_dim)


def _held(store: KVStore, empty: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values `(B, H, M, D)` in a store, as many of each row; `empty` where there are none."""
    if store.layer.tail is None:
        store.append(empty, empty, None)
    tail = store.layer.tail
    assert tail is not None
    k, v, real = tail.keys, tail.values, tail.real
    if real is None:
        return k, v
    # rows that were joined with longer ones
    order = torch.sort((~real).to(torch.uint8), dim=1, stable=True).indices[:, : int(real.sum(1).max())]
    index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    return k.gather(2, index), v.gather(2, index)


def _grouped(x: Tensor, shared: Tensor) -> Tensor:
    """x `(B, H, C, R, M)` times shared `(B, Hk, C, M, E)`, each of its heads for a group of H / Hk."""
    kv_heads, rows = shared.shape[1], x.shape[3]
    folded = x.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(3, 4) @ shared
    return folded.unflatten(3, (-1, rows)).transpose(2, 3).flatten(1, 2)
