"""KVQuant: keys quantised per channel before RoPE and values per token, in codebooks fitted to what the loss is sensitive to.

Before the rotary embedding a key channel keeps its mean and scale along the sequence, so static bounds for each channel, found offline,
serve all tokens. Values get bounds token by token. The few entries outside are kept as they are, in a sparse list.

    offline   gradients g of the loss to keys and values of calibration text; outlier share f, t = 1 - f / 2
              keys: lo, hi = quantiles 1 - t, t of each channel;  x_n = (x - (hi + lo) / 2) / ((hi - lo) / 2)
              one codebook of 2^b levels a layer for keys and one for values: k-means on x_n, weights g^2, |x_n| <= 1 only
              Q-Norm:  level <- level s1 / s2 + (m1 - m2 s1 / s2), m, s mean and deviation of x_n before (1) and after (2) rounding
    keys      outside [lo, hi]: listed (at most `cap` a token); else the nearest level; turned to their places when read
    values    the f C most extreme of a token's C channels (over all heads): listed; lo, hi = bounds of the others; nearest level
    first     `sinks` tokens as they are

Everything is encoded when the prompt has ended, new tokens `interval` at a time. Reading turns keys chunk by chunk.

Source: kvquant, arXiv 2401.18079. Chosen here: the codebooks are fitted to at most `fit_tokens` tokens a layer, drawn from all calibration
tokens by a hash; the Fisher weights of keys are those after the rotary embedding, turned back like the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from saccade.cache.codebook import CodebookStore
from saccade.cache.parted import PartedSegment
from saccade.cache.stores import PlainStore, Store
from saccade.core import CachePolicy, Info, LayerContext, Rotary, StoredKV, register
from saccade.ops.quant import codebook, codebook_decode, codebook_encode, split_outliers
from saccade.parts.placed import placed
from saccade.parts.rotary import turn
from saccade.parts.saliency import hashed
from saccade.parts.static.gradient import GradientCalibrated
from saccade.parts.static.keepset import PLACE, note_places

RAW = 16  # "not quantised"
_PLANNED = ("key_low", "key_high", "key_levels", "key_restored", "value_levels", "value_restored")
WIDTHS = (2, 3, 4, 8)


@register
@dataclass(frozen=True, kw_only=True)
class KVQuant(CachePolicy, GradientCalibrated):
    """bits: of a code: 2, 3, 4, 8, or 16 for "not quantised". outliers: share of entries kept apart, f, in [0, 1]. cap: most outliers of a
    key token over all heads (the nearest ones to the bounds are rounded to them), or None. sinks: first tokens that stay as they
    are. q_norm: whether levels are shifted and scaled to keep mean and deviation; None: at 2 bits only. interval: tokens that are
    encoded together while decoding. fit_tokens: tokens per layer that the codebooks are fitted to.

    A plan is made for its bits, outliers and q_norm.
    """

    bits: int = 4
    outliers: float = 0.01
    cap: int | None = None
    sinks: int = 1
    q_norm: bool | None = None
    interval: int = 64
    fit_tokens: int = 4096

    info = Info(
        slug="kvquant", phase="cache", needs=frozenset({"calibration"}), frees_memory=True, append_only=False, encodes=True,
        opened={"bits": RAW}, tiny={"bits": 3, "interval": 8},
        opts_out={"stepwise": "encodes when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.bits not in (*WIDTHS, RAW):
            raise ValueError(f"kvquant(bits={self.bits!r}) is not one of {', '.join(map(str, WIDTHS))} or {RAW} (not quantised)")
        if isinstance(self.outliers, bool) or not 0 <= self.outliers <= 1:
            raise ValueError(f"kvquant(outliers={self.outliers!r}) is not a share of the entries: give a number from 0 to 1")
        if self.q_norm not in (None, True, False):
            raise ValueError(f"kvquant(q_norm={self.q_norm!r}) is not True, False or None")
        for name, least in (("cap", 0), ("sinks", 0), ("interval", 1), ("fit_tokens", 16)):
            value = getattr(self, name)
            if not (name == "cap" and value is None) and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"kvquant({name}={value!r}) is not a whole number of at least {least}")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def loss_tokens(self, n: int) -> int:
        return n - 1

    def measure_gradient(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> dict[str, Tensor]:
        """Keys before RoPE, values `(tokens, H, d)` and squared gradients of both, without the first tokens."""
        rotary = _rotary(ctx)
        k, v = k.detach().requires_grad_(), v.detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.attend(q, k, v, None)
        d_k, d_v = torch.autograd.grad(out, (k, v), d_out)
        places = torch.arange(k.shape[2], device=k.device)
        k, d_k = (turn(x.detach(), -places, rotary) for x in (k, d_k))
        found = {"keys": k, "values": v.detach(), "key weights": d_k.float() ** 2, "value weights": d_v.float() ** 2}
        rows = {name: x[:, :, self.sinks :].transpose(1, 2).flatten(0, 1).float() for name, x in found.items()}
        return {**rows, "tokens": torch.tensor(len(rows["keys"]))}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tokens so far, or the `fit_tokens` of them that a hash of their number ranks first."""
        before, new = int(sums.get("tokens", torch.tensor(0))), int(found["tokens"])
        number = torch.arange(before, before + new)
        number = torch.cat([sums["number"].cpu(), number]) if sums else number
        kept = torch.sort(hashed(number, 0), stable=True).indices[: self.fit_tokens].sort().values
        names = [name for name in found if name != "tokens"]
        both = {name: torch.cat([sums[name], found[name]]) if sums else found[name] for name in names}
        picked = {name: x[kept.to(x.device)] for name, x in both.items()}
        return {**picked, "number": number[kept], "tokens": torch.tensor(before + new)}

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        return {layer: {} if self.bits == RAW else self._fit(found) for layer, found in sums.items()}

    def _fit(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Bounds of each key channel `(H, d)`, and of keys and values the levels to round to and those that are read `(2^bits,)`."""
        keys, values = found["keys"], found["values"].flatten(1)
        share = self.outliers / 2
        # head by head: quantile takes a limited number of entries
        low, high = (torch.stack([head.quantile(t, dim=0) for head in keys.unbind(1)]) for t in (share, 1 - share))
        unit = _normalised(keys, (high + low) / 2, (high - low) / 2)
        levels, restored = self._levels(unit, found["key weights"], (keys >= low) & (keys <= high))
        dense, _, listed = split_outliers(values, self.outliers)
        inside = torch.ones_like(values, dtype=torch.bool).scatter(1, listed.long(), False)
        top, bottom = dense.amax(1, keepdim=True), dense.amin(1, keepdim=True)
        unit = _normalised(values, (top + bottom) / 2, (top - bottom) / 2)
        value_levels, value_restored = self._levels(unit, found["value weights"].flatten(1), inside)
        return {
            "key_low": low, "key_high": high, "key_levels": levels, "key_restored": restored, "value_levels": value_levels,
            "value_restored": value_restored,
        }  # fmt: skip

    def _levels(self, unit: Tensor, weights: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        x, w = unit[inside], weights[inside]
        if not len(x):  # everything is an outlier: any levels will do
            x, w = torch.linspace(-1, 1, 1 << self.bits), torch.ones(1 << self.bits)
        # where no weight is above zero, nothing is known of the loss
        w = w / w.mean() if bool(w.sum() > 0) else torch.ones_like(w)
        levels = codebook(x, self.bits, w)
        if not (self.bits == 2 if self.q_norm is None else self.q_norm):
            return levels, levels.clone()
        rounded = codebook_decode(codebook_encode(x, levels), levels)
        ratio = x.std(correction=0) / rounded.std(correction=0).clamp(min=1e-6)
        return levels, levels * ratio + (x.mean() - rounded.mean() * ratio)

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        if self.bits != RAW:
            note_places(ctx, kv, q.shape[2])

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length
        if n == 0 or self.bits == RAW:
            return
        if kv.valid is not None:
            raise ValueError("kvquant encodes heads that hold equally many tokens: this cache was thinned head by head before")
        rotary, places = _rotary(ctx), kv.side[PLACE]
        if len(ctx.found("key_levels")) != 1 << self.bits:
            raise ValueError(f"this kvquant plan has {len(ctx.found('key_levels'))} levels: calibrate again for bits={self.bits}")
        first = int((places < self.sinks).sum(-1).max())
        classes = (torch.arange(n, device=places.device) >= first).long().expand(len(places), n)
        segment = PartedSegment.by_class(
            kv.keys, kv.values, kv.side, classes, [_as_it_is, partial(self._encode, ctx)], places=places, rotary=[None, rotary]
        )
        kv.seal(segment, n)

    def _encode(self, ctx: LayerContext, keys: Tensor, values: Tensor) -> tuple[Store, Store]:
        """keys before RoPE and values `(B, H, n, ...)`."""
        found = {name: placed(ctx.found(name), keys.device) for name in _PLANNED}
        low, high = (found[name].to(keys.dtype).unsqueeze(1) for name in ("key_low", "key_high"))
        middle, half = (high + low) / 2, (high - low) / 2
        outside = (keys < low) | (keys > high)
        if self.cap is not None:
            outside = _farthest(_normalised(keys, middle, half).abs(), outside, self.cap)
        key_store = CodebookStore.encode(keys, self.bits, found["key_levels"], found["key_restored"], middle, half, outside)

        flat = values.transpose(1, 2).flatten(2)
        dense, _, listed = split_outliers(flat, self.outliers)
        top, bottom = dense.amax(-1), dense.amin(-1)
        apart = torch.zeros_like(flat, dtype=torch.bool).scatter(2, listed.long(), True).unflatten(2, (values.shape[1], -1)).transpose(1, 2)
        size = (*values.shape[:3], 1)
        middle, half = (x[:, None, :, None].expand(size) for x in ((top + bottom) / 2, (top - bottom) / 2))
        levels = found["value_levels"], found["value_restored"]
        return key_store, CodebookStore.encode(values, self.bits, *levels, middle, half, apart)


def _rotary(ctx: LayerContext) -> Rotary:
    if ctx.rotary is None:
        raise ValueError(f"layer {ctx.layer} of this model has no rotary embedding that keys can be turned by: use another quantiser")
    return ctx.rotary


def _normalised(x: Tensor, middle: Tensor, half: Tensor) -> Tensor:
    return (x - middle) / torch.where(half > 0, half, 1.0)


def _as_it_is(keys: Tensor, values: Tensor) -> tuple[Store, Store]:
    return PlainStore(keys), PlainStore(values)


def _farthest(distance: Tensor, outside: Tensor, cap: int) -> Tensor:
    """The `cap` entries of each token that are outside and of largest distance, bool `(B, H, n, d)`."""
    heads = distance.shape[1]
    flat = distance.masked_fill(~outside, -1.0).transpose(1, 2).flatten(2)
    best = torch.sort(flat, dim=-1, descending=True, stable=True).indices[..., :cap]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(2, best, True)
    return chosen.unflatten(2, (heads, -1)).transpose(1, 2) & outside
