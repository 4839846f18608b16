"""Sinks and a sliding window for prompts: the static pattern that a streaming-llm cache gives to a sequence read token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.core import Info, LayerContext, Prefill, Selection
from saccade.parts.lists import tile_ends
from saccade.parts.patterns import a_shape


@dataclass(frozen=True, kw_only=True)
class SinkWindow(Prefill):
    """The first `sinks` keys and each query's last `window` ones, itself included, tokens.

    block: queries and keys per tile; all rows of a tile read what any of them needs.

    Source: streaming-llm, arXiv 2309.17453, as a mask; the defaults are those of delta-attention's released backend.
    """

    sinks: int = 1024
    window: int = 2048
    block: int = 64

    info = Info(slug="streaming-llm", phase="prefill", opened={"window": 1 << 30})

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("block", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"streaming-llm({name}={value!r}) is not a whole number of at least {least}")

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        n_q, n_k = q.shape[2], k.shape[2]
        # sizes past the prompt would only lengthen lists
        sinks, window = (torch.tensor([[min(size, n_k)]], device=q.device) for size in (self.sinks, self.window))
        lists = a_shape(sinks, window, tile_ends(n_q, n_k, self.block, q.device), self.block, n_k)
        return lists.selection(n_q=n_q, n_k=n_k, block=self.block)
