"""AKVQ-VL: two bits for a vision-language model's cache, more for what its layers look at.

A layer is of one of two kinds. Where text gets clearly more attention than images, old text is stored in `text_bits` and old image tokens
in `low_bits`; where a few positions get most of it, those pivots stay as they are and all else is stored in `low_bits`. The newest
tokens stay as they are in every layer. What is quantised is rotated first, which spreads outlier channels over all:

    K' = K H, V' = V H, H the Walsh-Hadamard matrix over sqrt(D);   q.k = (q H).k',   out = (sum_t p_t v'_t) H
    per token, in groups of channels, [a, c] = clip [min, max]:  s = (c - a) / (2^b - 1),  z = -round(a / s),
    code = clamp(round(x / s) + z, 0, 2^b - 1),  x' = s (code - z)

New tokens are encoded when `interval` of them stand behind the newest `recent`.

Source: akvq-vl, arXiv 2501.15021. Chosen here:
- Pivots. The paper takes the tokens with the largest activations in the residual stream, which a cache policy does not see. Such tokens are
  the ones that attention heaps up on, so the tokens are taken that the last queries of the prompt give most attention, in each layer.
  They are chosen once, at the first encoding: massive activations stand on first tokens and delimiters.
- Kinds of layers. `text_layers` names them; else a plan does (`saccade.calibrate`, on text); else the prompt at hand decides, row by row.
  In each case the same rule (`favours_text`). A clip factor applies to minimum and maximum, and at 1 or 2 bits only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saccade.cache.parted import Encoder, PartedSegment
from saccade.cache.stores import PlainStore, Store, by_token
from saccade.core import CachePolicy, Calibrated, Info, LayerContext, StoredKV, register
from saccade.ops.quant import BITS
from saccade.parts.keep import best_slots
from saccade.parts.recent_queries import GUESSES, recall, remember
from saccade.parts.saliency import normalised_saliency

RAW = 16  # bits of an entry that is stored as it is
OBSERVED = 64  # newest queries whose attention tells pivots and kinds
FIRST = 5  # positions at the beginning that are no text or image for the comparison of the two
CLEARLY = 2.0  # how many times more attention a text token gets in a layer that favours text
DOMINATED = 0.5  # share of the attention that a layer's pivots get where they dominate


@register
@dataclass(frozen=True, kw_only=True)
class AKVQVL(CachePolicy, Calibrated):
    """recent: newest tokens that stay as they are, R. pivots: tokens per layer that stay so in a layer without text preference, P.

    text_bits, low_bits: 1, 2, 3, 4, 8, or 16 for "not quantised". group: channels of a head that share a scale (all, where a head has
    fewer). clip: factor on minimum and maximum at up to 2 bits, in (0, 1]. text_layers: layers that favour text, or None (see above).
    interval: tokens that are encoded together while decoding. Heads must have a power of two of channels.
    """

    recent: int = 128
    pivots: int = 15
    text_bits: int = 4
    low_bits: int = 2
    group: int = 128
    clip: float = 0.8
    text_layers: tuple[int, ...] | None = None
    interval: int = 32

    info = Info(
        slug="akvq-vl", phase="cache", needs=frozenset({"queries"}), frees_memory=True, append_only=False, encodes=True,
        opened={"text_bits": RAW, "low_bits": RAW}, tiny={"recent": 8, "pivots": 3, "interval": 4},
        opts_out={"stepwise": "encodes when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("text_bits", "low_bits"):
            if getattr(self, name) not in (*BITS, RAW):
                raise ValueError(
                    f"akvq-vl({name}={getattr(self, name)!r}) is not one of {', '.join(map(str, BITS))} or {RAW} (not quantised)"
                )
        for name, least in (("recent", 0), ("pivots", 0), ("group", 1), ("interval", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"akvq-vl({name}={value!r}) is not a whole number of at least {least}")
        if not 0 < self.clip <= 1:
            raise ValueError(f"akvq-vl(clip={self.clip!r}) is not a factor above 0 and at most 1")
        if self.text_layers is not None and not all(isinstance(x, int) and x >= 0 for x in self.text_layers):
            raise ValueError(f"akvq-vl(text_layers={self.text_layers!r}) are not layer numbers: give a tuple such as (0, 1), or None")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        rows = torch.arange(q.shape[2], device=q.device)
        received = normalised_saliency(q, rows, k, scale=ctx.scale, softcap=ctx.softcap).sum(1)
        return {"pivot share": pivot_share(received, self.pivots).sum(), "rows": torch.tensor(float(len(received)), device=q.device)}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"text_layer": sums["pivot share"] / sums["rows"] < DOMINATED}

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        if "text_layer" not in ctx.state:
            remember(ctx.state, q, ctx.seen, OBSERVED + GUESSES)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.recent + self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length - self.recent
        if n <= 0 or self.text_bits == self.low_bits == RAW:
            return
        if kv.valid is not None:
            raise ValueError("akvq-vl encodes heads that hold the same tokens: this cache was thinned head by head before")
        keys, values = kv.keys[:, :, :n], kv.values[:, :, :n]
        given = kv.side.get("vision")
        vision = torch.zeros(len(keys), n, dtype=torch.bool, device=keys.device) if given is None else given[:, 0, :n].bool()
        pivot = torch.zeros_like(vision)
        if "text_layer" not in ctx.state:
            received = self._received(ctx, kv)
            ctx.state["text_layer"] = self._kind(ctx, received[:, :n], vision)
            chosen, _ = best_slots(received.unsqueeze(1), self.pivots)
            pivot = torch.zeros_like(received, dtype=torch.bool).scatter_(1, chosen[:, 0], True)[:, :n]
            ctx.state.pop("queries", None)
        text_layer = ctx.state["text_layer"].unsqueeze(-1)
        # 0: as it is, 1: text_bits, 2: low_bits
        classes = torch.where(text_layer, 1 + vision.long(), 2 - 2 * pivot.long())
        encoders: list[Encoder] = [partial(self._encode, bits=bits) for bits in (RAW, self.text_bits, self.low_bits)]
        kv.seal(PartedSegment.by_class(keys, values, kv.side, classes, encoders), n)

    def _encode(self, keys: Tensor, values: Tensor, bits: int) -> tuple[Store, Store]:
        if bits == RAW:
            return PlainStore(keys), PlainStore(values)
        clip = self.clip if bits <= 2 else 1.0
        return by_token(keys, bits, self.group, clip=clip, rotate=True), by_token(values, bits, self.group, clip=clip, rotate=True)

    def _received(self, ctx: LayerContext, kv: StoredKV) -> Tensor:
        """Attention that each token gets from the last queries, summed over heads, `(B, n)`."""
        queries = recall(ctx.state, ctx.seen)
        if queries is None:
            return torch.zeros(len(kv.keys), kv.length, device=kv.keys.device)
        q = queries[:, :, -OBSERVED:]
        slots = (torch.arange(q.shape[2], device=q.device) + kv.length - q.shape[2]).clamp(min=0)
        return normalised_saliency(q, slots, kv.keys, scale=ctx.scale, softcap=ctx.softcap).sum(1)

    def _kind(self, ctx: LayerContext, received: Tensor, vision: Tensor) -> Tensor:
        """Whether this layer favours text, bool `(B,)`."""
        if self.text_layers is not None:
            known = ctx.layer in self.text_layers
        elif ctx.plan is not None:
            known = bool(ctx.found("text_layer"))
        else:
            return favours_text(received, vision, self.pivots)
        return torch.full((len(vision),), known, device=vision.device)


def pivot_share(received: Tensor, pivots: int) -> Tensor:
    """Share of the attention `received (B, n)` that the `pivots` tokens with most of it get, `(B,)`."""
    top = received.topk(min(pivots, received.shape[1]), dim=-1).values.sum(-1)
    return top / received.sum(-1).clamp(min=torch.finfo(received.dtype).tiny)


def favours_text(received: Tensor, vision: Tensor, pivots: int) -> Tensor:
    """Whether a layer looks at text, bool `(B,)`, from the attention each token `received (B, n)` and which are `vision (B, n)` bool.

    Not where `pivots` tokens get half of it or more; else where a text token gets at least twice as much as an image token, the first 5
    positions left out, or where there are no image tokens.
    """
    late = torch.arange(received.shape[1], device=received.device) >= FIRST
    means = []
    for mine in (vision & late, ~vision & late):
        means.append((received * mine).sum(-1) / mine.sum(-1).clamp(min=1))
    return (pivot_share(received, pivots) < DOMINATED) & (means[1] >= CLEARLY * means[0])
