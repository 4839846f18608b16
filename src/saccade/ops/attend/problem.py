"""One attention call, validated, as the implementations receive it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.core import HeadLayout, Selection


class ExtraKeys(NamedTuple):
    """Keys outside the sequence that every query reads (pooled stand-ins, learned sinks).

    k `(B, Hk, E, D)`, v `(B, Hk, E, Dv)`, log_weight `(B, Hk, E)` or None: added to their logits (log of how many keys one
    stands for).
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Problem:
    q: Tensor
    k: Tensor
    v: Tensor
    selection: Selection | None
    causal: bool
    scale: float
    softcap: float | None
    bias: Tensor | None
    return_lse: bool
    layout: HeadLayout

    def check(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise ValueError(f"softcap {self.softcap} must be positive, or None for no cap")
        if self.bias is not None:
            full = (self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])
            shape = self.bias.shape
            if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
                raise ValueError(f"bias has shape {tuple(shape)}: expected 4 dimensions broadcastable to {full}")

    @property
    def plain(self) -> bool:
        """No softcap, bias or log weights: torch's fused kernels can compute it."""
        weighted = self.selection is not None and self.selection.log_weight is not None
        return self.softcap is None and self.bias is None and not weighted

    def logits(self, scores: Tensor) -> Tensor:
        """Scale and cap raw products q.k."""
        logits = scores * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def over_extra(self, extra: ExtraKeys) -> Problem:
        """The same queries over the extra keys alone, as a non-causal problem with their weights as a bias."""
        if extra.k.shape[:2] != self.k.shape[:2] or extra.k.shape[:3] != extra.v.shape[:3]:
            raise ValueError(
                f"extra keys {tuple(extra.k.shape)} and values {tuple(extra.v.shape)} do not fit keys {tuple(self.k.shape)}: "
                "expected the same batch and key/value heads"
            )
        bias = None
        if extra.log_weight is not None:
            bias = extra.log_weight.repeat_interleave(self.layout.group, dim=1).unsqueeze(2)
        return replace(self, k=extra.k, v=extra.v, selection=None, causal=False, bias=bias, return_lse=True)
