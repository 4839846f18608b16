"""CSKV: a low-rank code for each old token, exact keys and values for the recent ones.

The keys of a token before the rotary embedding, all heads side by side, are K = x W_K, its values V = x W_V. Each is stored as a code
of r = floor(density D) H numbers,

    c_K = K E_K,   K' = c_K B_K, turned to its place,      c_V = V E_V,   V' = c_V B_V,

while the newest `window` tokens and up to as many more stay as they are. The prompt is attended exactly and coded when it has ended; while
decoding, the oldest `window` tokens are coded once there are two windows of them. In few bits: codes of keys by channel
over blocks of `window` tokens, codes of values by token over the r / H numbers that fall to a head.

What differs: the paper codes c = x A from the projection's input, which a cache does not hold; here the code comes from K or V
themselves, with A = W E. This loses nothing: ASVD's A is W E with E = V_r Sig_r^-0.5 (`saccade.parts.factors`), and the factors of least
reconstruction error, where training leads, are of that form too: E = B^T = the principal directions of K or V. Codes are made as tokens
leave the window instead of beside it, and need no room before.

`saccade.calibrate` gives those factors of least squared error on calibration text, in closed form. `saccade.train.factors` gives ASVD's
(`asvd_plan`), and trains any plan's on the reconstruction loss, codes in few bits included (`train_factors`).
Where a model's keys have no rotary embedding that can be turned back, they are coded as attention sees them. A code spans all heads:
behind a policy whose heads keep different tokens it ties those of one slot together, and loses more.

Source: cskv, arXiv 2409.10593.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.factored import FactoredSegment, Maps
from saccade.core import CachePolicy, Calibrated, Info, LayerContext, Rotary, StoredKV, register
from saccade.ops.quant import BITS
from saccade.parts.factors import beside, joint_rank, principal_factors
from saccade.parts.pca import second_moment
from saccade.parts.rotary import turn
from saccade.parts.static.keepset import PLACE, note_places

RAW = 16  # bits of a number that is stored as it is
_MAPS = "cskv.maps"


@register
@dataclass(frozen=True, kw_only=True)
class CSKV(CachePolicy, Calibrated):
    """key_density, value_density: share of the channels that codes keep, in (0, 1]. window: newest tokens that stay as they are, w,
    and tokens coded together while decoding. bits: of a code's number: 1, 2, 3, 4, 8, or 16 for "as it is".

    A plan is made for its densities.
    """

    key_density: float = 0.5
    value_density: float = 0.5
    window: int = 32
    bits: int = RAW

    info = Info(
        slug="cskv", phase="cache", needs=frozenset({"calibration"}), frees_memory=True, append_only=False, encodes=True,
        opened={"key_density": 1.0, "value_density": 1.0}, tiny={"window": 4},
        opts_out={"stepwise": "codes when the prompt ends, which a prompt fed token by token never shows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("key_density", "value_density"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"cskv({name}={value!r}) is not a share of the channels: give a number above 0 and at most 1")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"cskv(window={self.window!r}) is not a whole number of at least 1")
        if self.bits not in (*BITS, RAW):
            raise ValueError(f"cskv(bits={self.bits!r}) is not one of {', '.join(map(str, BITS))} or {RAW} (not quantised)")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def rank(self, name: str, dim: int, heads: int) -> int:
        """r of "key" or "value"."""
        return joint_rank(getattr(self, f"{name}_density"), dim, heads)

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Second moments of keys and values, heads side by side, `(C, C)`; and the number of heads, which samples share."""
        plain = unturned(k, ctx.rotary)
        found = {f"{name}_moment": second_moment(beside(x).unsqueeze(1))[0] for name, x in (("key", plain), ("value", v))}
        return {**found, "heads": torch.tensor(k.shape[1])}

    def combine(self, sums: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**super().combine(sums, found), "heads": found["heads"]}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        found, heads = {}, int(sums["heads"])
        for name in ("key", "value"):
            width = len(sums[f"{name}_moment"])
            factors = principal_factors(sums[f"{name}_moment"], self.rank(name, width // heads, heads))
            found |= {f"{name}_down": factors.down, f"{name}_up": factors.up, f"{name}_offset": torch.zeros(width)}
        return found

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        note_places(ctx, kv, q.shape[2])

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length >= 2 * self.window

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        n = kv.length - self.window
        if n <= 0:
            return
        if kv.valid is not None:
            raise ValueError("cskv codes heads that hold equally many tokens: this cache was thinned head by head before")
        keys, values, positions, places = (x[:, :, :n] for x in (kv.keys, kv.values, kv.side["positions"], kv.side[PLACE]))
        key_maps, value_maps = self._maps(ctx, "key", keys), self._maps(ctx, "value", values)
        kv.seal(FactoredSegment.encode(
            keys, values, positions, key_maps, value_maps, rotary=own_rotary(ctx.rotary), places=places,
            bits=None if self.bits == RAW else self.bits, block=self.window,
        ), n)  # fmt: skip

    def _maps(self, ctx: LayerContext, name: str, x: Tensor) -> Maps:
        """The plan's, on the device of entries x `(B, H, n, D)` once for all segments of the layer."""
        key = f"{_MAPS}.{name}"
        if key not in ctx.state:
            heads, dim = x.shape[1], x.shape[3]
            down, up, offset = (ctx.found(f"{name}_{part}").to(x.device) for part in ("down", "up", "offset"))
            if down.shape[1] != self.rank(name, dim, heads):
                raise ValueError(
                    f"this cskv plan has {name} codes of {down.shape[1]} numbers: calibrate again for "
                    f"{name}_density={getattr(self, f'{name}_density')}"
                )
            ctx.state[key] = Maps.of(down, up, offset, heads)
        return ctx.state[key]


def own_rotary(rotary: Rotary | None) -> Rotary | None:
    """The embedding, None where it turns nothing."""
    return None if rotary is None or not rotary.inv_freq.numel() else rotary


def unturned(keys: Tensor, rotary: Rotary | None) -> Tensor:
    """Keys `(B, H, n, D)` of tokens 0 ... n - 1 before the rotary embedding; as they are where there is none to be taken off."""
    rotary = own_rotary(rotary)
    return keys if rotary is None else turn(keys, -torch.arange(keys.shape[2], device=keys.device), rotary)
