"""RazorAttention: the few heads that look far back keep everything; every other head keeps sinks, a local buffer and one averaged token.

Which heads look back is found with a text of random tokens that repeats (`parts/echo.py`): the heads that attend most to earlier copies
of a token (echo) and to what came right after them (induction), the best query head of each group counting for its key/value head. The
first p_e of all heads of the model by echo and the first p_i by induction are retrieval heads. Any other head keeps its first n_s tokens
and the last

    L = max(S0, N / C)        of N tokens seen,

and in place of the n_d tokens D in between one entry, k_c = mean_D k_j, v_c = mean_D v_j (keys after the rotary embedding), whose logit
is raised by log n_d: it counts as often as there are tokens in it. What is dropped later moves the means by its share.

Source: razorattention, arXiv 2407.15891, section 3. ALiBi models need no probe: `parts/alibi.py`. Chosen here: shares of heads are
rounded up; while decoding, the buffer may grow by `interval` tokens before it is cut back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.cache.counted import CountedSegment
from saccade.core import CachePolicy, Calibrated, Info, LayerContext, StoredKV, register
from saccade.parts.echo import echo_scores, places_of, repeated_ids
from saccade.parts.ragged import slots_of, staying


@register
@dataclass(frozen=True, kw_only=True)
class RazorAttention(CachePolicy, Calibrated):
    """echo, induction: shares of all key/value heads that are retrieval heads by each score (p_e, p_i), in [0, 1]. local: least tokens of
    the buffer (S0). divisor: the buffer holds at least this part of the tokens seen, N / divisor (C). sinks: first tokens kept (n_s).
    compensate: whether the averaged token is kept. interval: tokens of a decoding stretch that are dropped together. distinct, repeats:
    tokens of the probe (R) and how often it holds each (r); only the offline part uses them.
    """

    echo: float = 0.01
    induction: float = 0.14
    local: int = 4000
    divisor: float = 5.0
    sinks: int = 4
    compensate: bool = True
    interval: int = 64
    distinct: int = 2500
    repeats: int = 4

    info = Info(
        slug="razorattention", phase="cache", needs=frozenset({"calibration"}), frees_memory=True, append_only=False, ragged=True,
        opened={"induction": 1.0}, tiny={"local": 12, "divisor": 16, "sinks": 2, "interval": 8, "distinct": 24},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("echo", "induction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"razorattention({name}={value!r}) is not a share of the heads: give a number from 0 to 1")
        for name, least in (("local", 1), ("sinks", 0), ("interval", 1), ("distinct", 2), ("repeats", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"razorattention({name}={value!r}) is not a whole number of at least {least}")
        if isinstance(self.divisor, bool) or not isinstance(self.divisor, int | float) or self.divisor < 1:
            raise ValueError(f"razorattention(divisor={self.divisor!r}) does not divide a length: give a number of at least 1")

    # -- the offline part --------------------------------------------------------------------------------------------------

    def sample_ids(self, batch: Tensor, special: frozenset[int]) -> Tensor:
        return repeated_ids(batch, self.distinct, self.repeats, special)

    def measure(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        lse = ctx.partial(q, k, v, None).lse
        assert lse is not None
        lead = k.shape[2] - self.distinct * self.repeats
        scores = echo_scores(q, k, lse, period=self.distinct, lead=lead, scale=ctx.scale, softcap=ctx.softcap)
        best = [x.unflatten(1, (k.shape[1], -1)).amax(2).sum(0) for x in scores]
        return {"echo": best[0], "induction": best[1], "samples": torch.tensor(float(q.shape[0]))}

    def conclude(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: sums[name] / sums["samples"].to(sums[name].device) for name in ("echo", "induction")}

    def conclude_all(self, sums: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        means = {layer: self.conclude(found) for layer, found in sums.items()}
        for name in ("echo", "induction"):
            places = places_of([found[name] for found in means.values()])
            for found, place in zip(means.values(), places, strict=True):
                found[f"{name}_place"] = place
        return means

    # -- the cache ---------------------------------------------------------------------------------------------------------

    def retrieval_heads(self, ctx: LayerContext) -> Tensor:
        """Which key/value heads of this layer keep everything, bool `(Hk,)`."""
        return (ctx.found("echo_place") < self.echo) | (ctx.found("induction_place") < self.induction)

    def due(self, ctx: LayerContext, length: int) -> bool:
        return ctx.seen - ctx.state.get("served", 0) >= self.interval

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        if kv.heads != ctx.layout.kv_heads:
            raise ValueError(f"layer {ctx.layer} caches one latent for all heads, whose heads can't keep different tokens")
        ctx.state["served"] = ctx.seen
        buffer = max(self.local, math.ceil(ctx.seen / self.divisor))
        whole = self.retrieval_heads(ctx).to(kv.keys.device).view(1, -1, 1)
        counts = torch.where(whole, kv.length, min(kv.length, self.sinks + buffer))
        stay = staying(torch.zeros_like(kv.side["positions"]), counts, sinks=self.sinks, recent=buffer, valid=kv.valid)
        gone = ~stay if kv.valid is None else kv.valid & ~stay
        if not bool(gone.any()):
            return
        if self.compensate:
            kv.counted = CountedSegment.folding(kv.counted, kv.keys, kv.values, kv.side["positions"], gone)
        kv.keep(*slots_of(stay))
