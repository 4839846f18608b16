"""ZipCache: a cache in few bits, with more of them for the tokens that attention looks at.

Salient tokens are stored in 4 bits and the others in 2, in every key/value head on its own. Saliency is a token's attention column
mass divided by the number of rows that could attend to it, estimated from a few probe queries:

    p_j = sum_{probe rows i >= j} softmax_i(q_i . k_j) / |{probe rows i >= j}|         (summed over a group's query heads)

The lowest share r by p is not salient. What is quantised, with b the bits of its class:

    keys    per channel: one step and minimum for each channel of a head, over the tokens of the class
    values  channel-separable: c = sqrt(max_t |V[t]|) for each channel of a head over all tokens; V / c has one step and minimum for each
            token of a head

A step reads each class as it lies, one call of `decode_quantised` for each, and merges what they give. All entries stay in full
precision until the prompt has ended, and are encoded once; new tokens stay so until `interval` of them have come.

Source: zipcache, arXiv 2405.14256. What differs: values have their step and minimum in each head, not over all heads of a token, because
a token may be salient in one head only. (The public code gathers each head's class first, so that one "token" there is a different one
in each head.) They are never coarser for it, and take 4 bytes for each token and head in bfloat16, at 128 channels 0.8% of the entry in
full; positions, which are kept for each head, take as much. Chosen here, where the paper leaves it open: which positions are drawn at
random is decided by a hash of the position, so that a prompt in chunks has the probe rows of a prompt at once; the softmax of a probe row
runs over the entries that are about to be encoded, which orders them like the full softmax does for one row and one query head; a token
seen by no probe row counts as salient. Between prompt and encoding the probe queries take probe_share * group / 2 of the bytes of the
full-precision keys and values (`stats().index_bytes` counts them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saccade.cache.parted import Encoder, PartedSegment
from saccade.cache.stores import PlainStore, Store, by_channel, by_token_in_heads, channel_factor
from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.ops.quant import BITS
from saccade.parts.keep import best_slots, token_places
from saccade.parts.saliency import SPARE, ProbeQueries, normalised_saliency

RAW = 16  # bits of an entry that is stored as it is
_PROBES = "zipcache.probes"


@register
@dataclass(frozen=True, kw_only=True)
class ZipCache(CachePolicy):
    """salient_bits, other_bits: 1, 2, 3, 4, 8, or 16 for "not quantised".

    other_share: r, the share of tokens per head that get other_bits, in [0, 1]. probe_share: probe rows as a share of the tokens,
    in (0, 1], half the most recent and half drawn from the rest. interval: G, full-precision tokens at which decoding encodes them,
    ranked by the current query's attention (a later turn's prompt is encoded like the first one, with the tokens before it). Each
    time adds two calls a layer to the steps that follow: an answer of thousands of tokens wants a larger one.
    """

    salient_bits: int = 4
    other_bits: int = 2
    other_share: float = 0.4
    probe_share: float = 0.1
    interval: int = 100

    info = Info(
        slug="zipcache", phase="cache", needs=frozenset({"queries"}), frees_memory=True, append_only=False, encodes=True,
        opened={"salient_bits": RAW, "other_bits": RAW}, tiny={"interval": 8},
        opts_out={"stepwise": "encodes when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("salient_bits", "other_bits"):
            if getattr(self, name) not in (*BITS, RAW):
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, BITS))} or {RAW} (not quantised)")
        if not 0 <= self.other_share <= 1:
            raise ValueError(f"other_share={self.other_share!r} is not a share of the tokens: give a number from 0 to 1")
        if not 0 < self.probe_share <= 1:
            raise ValueError(f"probe_share={self.probe_share!r} is not a share of the tokens: give a number above 0 and at most 1")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f"interval={self.interval!r} is not a number of tokens: give an integer of at least 1")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        probes = ctx.state.setdefault(_PROBES, ProbeQueries(self.probe_share, ctx.seed * 1_000_003 + ctx.layer))
        probes.add(q, ctx.seen, kv.length)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length
        probes = ctx.state.pop(_PROBES, None)
        if not n:
            return
        if kv.valid is not None:
            raise ValueError("zipcache encodes heads that hold the same tokens: this cache was thinned head by head before")
        probes = ProbeQueries(self.probe_share, 0) if probes is None else probes
        # the first tokens, a long call or a short tail: a prompt has ended; else decoding has filled the interval
        prompt = n == ctx.seen or probes.widest > SPARE or n < self.interval
        places = token_places(kv, ctx.seen)
        length = n if places is None else ctx.seen
        q, slots = probes.rows(ctx.seen, length) if prompt else probes.last(ctx.seen, length)
        saliency = normalised_saliency(q, slots, kv.keys, scale=ctx.scale, softcap=ctx.softcap, places=places)
        salient, _ = best_slots(saliency, n - int(self.other_share * n + 1e-9))
        classes = torch.ones_like(saliency, dtype=torch.uint8).scatter_(2, salient, 0)
        bits = (self.salient_bits, self.other_bits)
        kv.seal(in_classes(kv.keys, kv.values, kv.side, classes, bits), n)


def in_classes(keys: Tensor, values: Tensor, side: dict[str, Tensor], classes: Tensor, bits: Sequence[int]) -> PartedSegment:
    """keys `(B, H, n, D)`, values `(B, H, n, Dv)` and positions `(B, H, n)` in `side` as a segment: each slot in the bits that its class
    has, classes `(B, H, n)` or, for all heads, `(B, n)`."""
    factor = channel_factor(values)
    encoders: list[Encoder] = [partial(_encode, bits=b, factor=factor) for b in bits]
    return PartedSegment.by_class(keys, values, side, classes, encoders)


def _encode(keys: Tensor, values: Tensor, bits: int, factor: Tensor) -> tuple[Store, Store]:
    if bits == RAW:
        return PlainStore(keys), PlainStore(values)
    return by_channel(keys, bits), by_token_in_heads(values, bits, factor)
