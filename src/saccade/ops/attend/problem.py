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


class LowRank(NamedTuple):
    """A bias `a b^T` on the logits: a `(B or 1, Hq or 1, Nq, R)`, b `(B or 1, Hq or 1, Nk, R)`."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The arguments of `attend`. causal: what holds in the end, the selection's own or the argument. Positions come in pairs."""

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
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    lengths: Tensor | None = None
    starts: Tensor | None = None
    sinks: Tensor | None = None
    low_rank: LowRank | None = None

    @property
    def ragged(self) -> bool:
        """Which keys count differs from row to row or from sequence to sequence."""
        return self.lengths is not None or self.starts is not None or self.cu_seqlens_q is not None

    @property
    def masked(self) -> bool:
        """Who sees whom is not told by `causal` and the selection alone."""
        return self.ragged or self.q_positions is not None

    @property
    def plain(self) -> bool:
        """No softcap, bias or log weights, sinks or other masks than the causal one: torch's fused kernels can compute it."""
        weighted = self.selection is not None and self.selection.log_weight is not None
        return self.softcap is None and not weighted and not self.masked and self.sinks is None and not self.biased

    @property
    def biased(self) -> bool:
        return self.bias is not None or self.low_rank is not None

    @property
    def wants_grad(self) -> bool:
        """Whether autograd will ask for the gradient of any input."""
        weight = None if self.selection is None else self.selection.log_weight
        inputs = (self.q, self.k, self.v, self.bias, weight, self.sinks, *(self.low_rank or ()))
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def logits(self, scores: Tensor) -> Tensor:
        """Scale and cap raw products q.k."""
        logits = scores * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def over_extra(self, extra: ExtraKeys) -> Problem:
        """The same queries over the extra keys alone, as a non-causal problem whose bias of rank 1 is their weights."""
        if extra.k.shape[:2] != self.k.shape[:2] or extra.k.shape[:3] != extra.v.shape[:3]:
            raise ValueError(
                f"extra keys {tuple(extra.k.shape)} and values {tuple(extra.v.shape)} do not fit keys {tuple(self.k.shape)}: "
                "expected the same batch and key/value heads"
            )
        weights = None
        if extra.log_weight is not None:
            if extra.log_weight.shape != extra.k.shape[:3]:
                raise ValueError(
                    f"log weights {tuple(extra.log_weight.shape)} do not fit extra keys {tuple(extra.k.shape)}: "
                    f"expected {tuple(extra.k.shape[:3])}"
                )
            by_query_head = extra.log_weight.repeat_interleave(self.layout.group, dim=1).unsqueeze(-1)
            ones = by_query_head.new_ones(1, 1, 1, 1).expand(1, 1, self.q.shape[2], 1)
            weights = LowRank(ones, by_query_head)
        return replace(
            self, k=extra.k, v=extra.v, selection=None, causal=False, bias=None, return_lse=True, q_positions=None, k_positions=None,
            cu_seqlens_q=None, cu_seqlens_k=None, lengths=None, starts=None, sinks=None, low_rank=weights,
        )  # fmt: skip
