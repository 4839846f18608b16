"""ZipVL: per layer, the tokens that cover a share tau of attention take part in prefill and get more bits in the cache.

A few probe rows S (the latest queries and random ones) give each token its attention, averaged over heads. How many tokens matter is
read off the plain mass, which ones off the mass per row that could see them, and all heads of a layer share the choice:

    a_j = mean_h sum_{i in S} softmax_i(q_i . k_j),    p = min{ m : the m largest a add up to tau sum_j a_j }
    t_j = a_j / |{i in S, i >= j}|,                    I = the p tokens of largest t, the latest ones among them

    prefill   out[I] = dense causal attention of Q[I] over K[I], V[I];  the other rows get 0 and go on through the residual
    cache     I in `high_bits`, the rest in `low_bits`, with zipcache's quantiser (keys per channel within a class, values token by
              token after division by a factor per channel);  rest="drop": the rest is evicted

As `attach(prefill="zipvl", cache="zipvl")` the two make the same choice from the same probes; each works alone too. New tokens stay in
full precision until `interval` of them have come, and are then judged by the latest queries among them. A prefill of few probes loses
tokens that only their neighbours look at, which a model with local heads can't spare: there `drawn` must be large.
All rows of a prompt take part in its choice: in chunks, each chunk chooses among the tokens so far.

Source: zipvl, arXiv 2410.08584. Chosen here, where the paper leaves it open: the latest rows are always important, since few rows have seen
them; random rows are drawn by a hash of the position, so that a prompt in chunks has the probes of a prompt at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from saccade.cache.parted import Encoder, PartedSegment
from saccade.cache.stores import PlainStore, Store, by_channel, by_token_over_heads, channel_factor
from saccade.core import CachePolicy, Info, LayerContext, Mass, Prefill, Selection, StoredKV, register
from saccade.core.tilemath import list_true
from saccade.ops.estimate import row_sums
from saccade.ops.gpu import runs_on
from saccade.ops.quant import BITS
from saccade.parts.choose import choose, ranks
from saccade.parts.fixed_probes import FixedProbes
from saccade.parts.saliency import column_mass

RAW = 16  # bits of an entry that is stored as it is
_PROBES = "zipvl.probes"


@register
@dataclass(frozen=True, kw_only=True)
class ZipVL(Prefill, CachePolicy):
    """tau: share of attention that the important tokens cover, in (0, 1]. recent, drawn: probe rows of each kind; the `recent` last
    tokens are always important. high_bits, low_bits: 1, 2, 3, 4, 8, or 16 for "not quantised". rest: "low_bit" or "drop". interval: tokens
    that are encoded together while decoding.
    """

    tau: float = 0.975
    recent: int = 64
    drawn: int = 64
    high_bits: int = 4
    low_bits: int = 2
    rest: Literal["low_bit", "drop"] = "low_bit"
    interval: int = 100

    info = Info(
        slug="zipvl", phase="cache", needs=frozenset({"queries"}), frees_memory=True, append_only=False, encodes=True,
        opened={"tau": 1.0, "high_bits": RAW, "low_bits": RAW}, tiny={"tau": 0.8, "recent": 4, "drawn": 8, "interval": 8},
        opts_out={"stepwise": "encodes when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not 0 < self.tau <= 1:
            raise ValueError(f"zipvl(tau={self.tau!r}) is not a share of attention: give a number above 0 and at most 1")
        for name, least in (("recent", 1), ("drawn", 0), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"zipvl({name}={value!r}) is not a whole number of at least {least}")
        for name in ("high_bits", "low_bits"):
            if getattr(self, name) not in (*BITS, RAW):
                raise ValueError(
                    f"zipvl({name}={getattr(self, name)!r}) is not one of {', '.join(map(str, BITS))} or {RAW} (not quantised)"
                )
        if self.rest not in ("low_bit", "drop"):
            raise ValueError(f"zipvl(rest={self.rest!r}) is not 'low_bit' or 'drop'")

    # -- a prompt ----------------------------------------------------------------------------------------------------------

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        chosen = self._chosen(ctx, q, k)
        read = chosen[:, None, None, :] & chosen[:, None, k.shape[2] - q.shape[2] :, None]
        return Selection.from_token_mask(read, block_q=1, n_q=q.shape[2])

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] == 1 or self.tau == 1:
            return ctx.attend(q, k, v, None)
        chosen = self._chosen(ctx, q, k)
        out = v.new_zeros(*q.shape[:3], v.shape[-1])
        for row, mine in enumerate(chosen):
            one, keys = slice(row, row + 1), mine.nonzero().squeeze(-1)
            # the order is kept, so the causal mask of the gathered tokens is the ordinary one, aligned at the end
            rows = mine[k.shape[2] - q.shape[2] :].nonzero().squeeze(-1)
            out[one, :, rows] = ctx.attend(q[one, :, rows], k[one, :, keys], v[one, :, keys], None)
        return out

    def _chosen(self, ctx: LayerContext, q: Tensor, k: Tensor) -> Tensor:
        """The important ones of the tokens k, bool `(B, n)`, in a prompt whose queries are q."""
        probes = self._new_probes(ctx)
        probes.add(q, k.shape[2])
        rows, slots = probes.rows(k.shape[2], k.shape[2])
        if rows is not None:
            ctx.count(float((slots + 1).sum()))
        return important(rows, slots, k, tau=self.tau, recent=self.recent, scale=ctx.scale, softcap=ctx.softcap)

    def _new_probes(self, ctx: LayerContext) -> FixedProbes:
        return FixedProbes(self.recent, self.drawn, ctx.seed * 1_000_003 + ctx.layer)

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        ctx.state.setdefault(_PROBES, self._new_probes(ctx)).add(q, ctx.seen)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        probes: FixedProbes | None = ctx.state.pop(_PROBES, None)
        if not kv.length or (self.high_bits == RAW and (self.tau == 1 or (self.rest == "low_bit" and self.low_bits == RAW))):
            return  # nothing would be encoded or dropped
        if kv.valid is not None:
            raise ValueError("zipvl encodes heads that hold the same tokens: this cache was thinned head by head before")
        rows, slots = (None, torch.empty(0)) if probes is None else probes.rows(ctx.seen, kv.length)
        chosen = important(rows, slots, kv.keys, tau=self.tau, recent=self.recent, scale=ctx.scale, softcap=ctx.softcap)
        classes, bits = (~chosen).long(), (self.high_bits, self.low_bits)
        if self.rest == "drop":
            counts = chosen.sum(-1)
            kept, _ = list_true(chosen.unsqueeze(1).expand(-1, kv.heads, -1))
            kv.keep(kept.long().clamp(max=kv.length - 1), counts.unsqueeze(1).expand(-1, kv.heads))
            # rows that keep less than others have gaps at their ends: of a class that nothing encodes
            classes = (torch.arange(kv.length, device=counts.device) >= counts.unsqueeze(-1)).long()
            bits = (self.high_bits,)
        factor = channel_factor(kv.values)
        encoders: list[Encoder] = [partial(_encode, bits=b, factor=factor) for b in bits]
        kv.seal(PartedSegment.by_class(kv.keys, kv.values, kv.side, classes, encoders), kv.length)


def important(
    q: Tensor | None, slots: Tensor, k: Tensor, *, tau: float, recent: int, scale: float, softcap: float | None = None
) -> Tensor:
    """The tokens of k `(B, Hk, n, D)` that matter to probe rows q `(B, Hq, P, D)` at `slots (P,)`, bool `(B, n)`.

    As many as cover the share tau of the rows' attention (at least `recent`), the last `recent` among them. Without rows: all.
    """
    n = k.shape[2]
    if q is None or not len(slots):
        return torch.ones(len(k), n, dtype=torch.bool, device=k.device)
    if runs_on(k) and q.dtype == k.dtype:
        # one kernel, which writes no probabilities and repeats no keys for the queries of a group
        mass = row_sums(q, k, slots, scale=scale, softcap=softcap).columns.sum(1) / q.shape[1]
    else:
        mass = column_mass(q, slots, k, scale=scale, softcap=softcap).sum(1) / q.shape[1]
    return choose_tokens(mass, slots, tau=tau, recent=recent)


def choose_tokens(mass: Tensor, slots: Tensor, *, tau: float, recent: int) -> Tensor:
    """The count by the plain `mass (B, n)` of probe rows at `slots (P,)`, the choice by mass per row that sees a token: bool `(B, n)`."""
    n = mass.shape[1]
    tokens = torch.arange(n, device=mass.device)
    count = choose(mass, Mass(tau)).sum(-1).clamp(min=min(recent, n))
    seen_by = len(slots) - torch.searchsorted(slots.sort().values, tokens)
    score = torch.where(seen_by > 0, mass / seen_by.clamp(min=1), torch.inf)
    return ranks(score.masked_fill(tokens >= n - recent, torch.inf)) < count.unsqueeze(-1)


def _encode(keys: Tensor, values: Tensor, bits: int, factor: Tensor) -> tuple[Store, Store]:
    if bits == RAW:
        return PlainStore(keys), PlainStore(values)
    return by_channel(keys, bits), by_token_over_heads(values, bits, factor)
