"""StreamingLLM: softmax parks spare attention on the first tokens; keep those sinks next to a sliding window.

The cache holds the first n_s and the last n_r tokens of every head; after each step the oldest entry that is no sink is
dropped. Positions are those in the cache (0 ... n - 1), so that distances stay within the trained length however long
the stream is. Rotary angles depend on distances only, so a window key keeps the angle of its true position, and a sink
is turned forward by the number of tokens dropped so far:

    sink at p, E tokens dropped:  rope(k, p + E)

It is always turned from its original key, so that rounding does not add up. The model computes its own angles in
float32, which limits very long streams: at position 10^6 the fastest pair is known to 0.03 radians.

With sinks=0 this is window attention, the baseline that fails once the first tokens have left.

Source: streaming-llm, arXiv 2309.17453.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from saccade.core import CachePolicy, Info, LayerContext, StoredKV, register
from saccade.parts.keep import keep_ends
from saccade.parts.placed import placed
from saccade.parts.rotary import turn

TURNED = "turned"  # the side array: by how many positions a key has been moved


@register
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(CachePolicy):
    """Keeps `sinks` first and `window` last tokens.

    positions: "reindexed" (as in the paper: a key's position is its place in the cache; the model must use rotary
    embeddings) or "original" (keys stay where they stood; works with any model).
    """

    sinks: int = 4
    window: int = 1020
    positions: Literal["reindexed", "original"] = "reindexed"

    info = Info(
        slug="streaming-llm", phase="cache", frees_memory=True, append_only=False, opened={"window": 1 << 30},
        tiny={"sinks": 2, "window": 24},
        opts_out={"stepwise": "a prompt at once attends before entries are dropped; token by token they go on the way"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ValueError(f"sinks={self.sinks}, window={self.window}: give at least 0 sinks and 1 token of window")
        if self.positions not in ("reindexed", "original"):
            raise ValueError(f"positions={self.positions!r} is not 'reindexed' or 'original'")

    @property
    def _turns(self) -> bool:
        return self.positions == "reindexed" and self.sinks > 0

    def watch(self, ctx: LayerContext, kv: StoredKV, q: Tensor) -> None:
        if not self._turns:
            return
        why = "has no rotary embedding whose keys can be turned" if ctx.rotary is None else None
        if kv.heads != ctx.layout.kv_heads:
            why = "caches one latent for all heads, which can't be turned"
        if why is not None:
            raise ValueError(f'layer {ctx.layer} of this model {why}: use streaming-llm(positions="original")')

    def due(self, ctx: LayerContext, length: int) -> bool:
        return length > self.sinks + self.window

    def compress(self, ctx: LayerContext, kv: StoredKV) -> None:
        keep_ends(kv, self.sinks, self.window)
        if self._turns and kv.length < ctx.seen:
            self._turn_sinks(ctx, kv)

    def _turn_sinks(self, ctx: LayerContext, kv: StoredKV) -> None:
        """Move the sinks up to the window."""
        assert ctx.rotary is not None  # watch has refused models without
        original, moved, known = kv.keys[:, :, : self.sinks], kv.side.get(TURNED), ctx.state.get("sinks")
        if moved is None or known is None:
            original = original.clone()
        else:
            n = min(known.shape[2], original.shape[2])
            # a sink that was taken back and written anew stands where it was written
            first = torch.where((moved[:, :, :n] == 0).unsqueeze(-1), original[:, :, :n], known[:, :, :n])
            original = first if n == original.shape[2] else torch.cat([first, original[:, :, n:]], dim=2)
        ctx.state["sinks"] = original
        dropped = ctx.seen - kv.length
        # nothing here is copied from the host, for which a GPU would wait
        rotary = replace(ctx.rotary, inv_freq=placed(ctx.rotary.inv_freq, original.device, torch.float64))
        shift = torch.full((), float(dropped), dtype=torch.float64, device=original.device)
        kv.write(0, keys=turn(original, shift, rotary), side={TURNED: dropped})
