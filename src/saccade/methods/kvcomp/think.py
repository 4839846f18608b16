"""ThinK: old keys lose the channels that recent queries use least.

When the prompt has ended, each key/value head scores its channels by the norm of their share in the recent query-key products,

    score_j = || Q[:, j] K[:, j]^T ||_F = ||Q[:, j]||_2 ||K[:, j]||_2

over the last `observed` queries of all heads of its group and all keys it holds, and the floor(share D) lowest are removed.
Thinned keys are stored in the channels that are left and meet the query's same channels, with the scale of all D: the same as
zeros in the removed ones. The last `recent` keys and all later ones stay whole, and so do values.

    value_share > 0:  score_j = || sqrt(a) V[:, j] ||_2,  a_t the attention that the observed queries give token t;
                      removed value channels are zero in the output
    key_bits < 16:    the keys that are left are quantised per channel, `group` tokens sharing a scale (ThinK with KIVI)

Source: think, arXiv 2407.21018. Chosen here: one mask for each key/value head, from squared query norms summed over its group (a mask
per query head would store keys once for each); the form of the value variant. Acts on what an eviction policy has left:
"snapkv(budget=1024)|think".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.parted import Part, PartedSegment, shared
from saccade.cache.stores import PlainStore, Store, by_channel
from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.ops.quant import BITS
from saccade.parts.recent_queries import GUESSES, recall, remember
from saccade.parts.saliency import column_mass

RAW = 16  # bits of an entry that is stored as it is


@register
@dataclass(frozen=True, kw_only=True)
class ThinK(CachePolicy):
    """share: of key channels that are removed, lambda, in [0, 1). recent: newest keys that stay whole, R. observed: newest queries
    that score, S_obs. value_share: of value channels that are removed. key_bits: of what is left of the keys: 1, 2, 3, 4, 8, or 16 for
    "as it is". group: tokens that share a scale when keys are quantised.

    A later turn's prompt is thinned like the first one, with channels of its own.
    """

    share: float = 0.4
    recent: int = 32
    observed: int = 32
    value_share: float = 0.0
    key_bits: int = RAW
    group: int = 32

    info = Info(
        slug="think", phase="cache", needs=frozenset({"queries"}), frees_memory=True, append_only=False, encodes=True,
        opened={"share": 0.0}, tiny={"share": 0.75, "recent": 4, "observed": 8},
        opts_out={"stepwise": "thins when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("share", "value_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"think({name}={getattr(self, name)!r}) is not a share of the channels: give a number from 0 to below 1")
        for name, least in (("recent", 0), ("observed", 1), ("group", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"think({name}={value!r}) is not a whole number of at least {least}")
        if self.key_bits not in (*BITS, RAW):
            raise ValueError(f"think(key_bits={self.key_bits!r}) is not one of {', '.join(map(str, BITS))} or {RAW} (not quantised)")

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        remember(ctx.state, q, ctx.seen, self.observed + GUESSES)

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        queries = recall(ctx.state, ctx.seen)
        n = kv.length - self.recent
        dims = (kv.keys.shape[-1], kv.values.shape[-1])
        removed = (int(self.share * dims[0] + 1e-9), int(self.value_share * dims[1] + 1e-9))
        if n <= 0 or queries is None or (not any(removed) and self.key_bits == RAW):
            return
        if kv.valid is not None:
            raise ValueError("think thins heads that hold equally many tokens: this cache was thinned head by head before")
        q, keys, values = queries[:, :, -self.observed :], kv.keys[:, :, :n], kv.values[:, :, :n]
        kept = key_scores(q, kv.keys).argsort(dim=-1, descending=True, stable=True)[..., : dims[0] - removed[0]].sort(-1).values
        key_channels = value_channels = None
        thin_keys, thin_values = keys, values
        if removed[0]:
            key_channels, thin_keys = kept.to(torch.int16), _in_channels(keys, kept)
        if removed[1]:
            slots = (torch.arange(q.shape[2], device=q.device) + kv.length - q.shape[2]).clamp(0, n - 1)
            scores = value_scores(column_mass(q, slots, keys, scale=ctx.scale, softcap=ctx.softcap), values)
            best = scores.argsort(dim=-1, descending=True, stable=True)[..., : dims[1] - removed[1]].sort(-1).values
            value_channels, thin_values = best.to(torch.int16), _in_channels(values, best)
        key_store: Store = PlainStore(thin_keys.clone()) if self.key_bits == RAW else by_channel(thin_keys, self.key_bits, self.group)
        counts = torch.full(keys.shape[:2], n)
        part = Part(
            keys=key_store, values=PlainStore(thin_values.clone()), positions=shared(kv.side["positions"][:, :, :n]), counts=counts,
            dims=dims, key_channels=key_channels, value_channels=value_channels,
        )  # fmt: skip
        kv.seal(PartedSegment([part]), n)


def key_scores(q: Tensor, k: Tensor) -> Tensor:
    """`||Q[:, j]|| ||K[:, j]||` of each channel, q `(B, Hq, m, D)` in groups over k `(B, Hk, n, D)`: float32 `(B, Hk, D)`."""
    wide = torch.promote_types(k.dtype, torch.float32)
    of_queries = q.to(wide).square().sum(2).unflatten(1, (k.shape[1], -1)).sum(2).sqrt()
    return of_queries * k.to(wide).norm(dim=2)


def value_scores(received: Tensor, v: Tensor) -> Tensor:
    """Norm of each channel of v `(B, Hk, n, Dv)`, tokens weighted by the attention they received `(B, Hk, n)`: `(B, Hk, Dv)`."""
    return (v.to(torch.promote_types(v.dtype, torch.float32)).square() * received.unsqueeze(-1)).sum(2).sqrt()


def _in_channels(x: Tensor, channels: Tensor) -> Tensor:
    """x `(B, H, n, D)` in `channels (B, H, d)` only, a copy."""
    return x.gather(3, channels.unsqueeze(2).expand(-1, -1, x.shape[2], -1))
