"""One linear attention, two readings: causal, through the scan, or of all tokens at once, through one product of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.core import Call, Mixer, MixerShape
from saccade.parts.linear.bidirectional import bidir_linear
from saccade.parts.linear.gates import Gate, Gated
from saccade.parts.linear.recurrent import Recurrent


@dataclass(frozen=True, kw_only=True)
class TwoWayMixer(Mixer):
    """bidirectional: every token reads all tokens in place of those so far; there is no state then, and no decoder takes it."""

    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.bidirectional:
            # facts about this setting, in the place of those about the class
            object.__setattr__(self, "info", replace(self.info, causality="bidirectional"))


class BothWays(Recurrent):
    """A `Recurrent` that can read all tokens at once. bidirectional: whether it does; it then has no write strengths, and its gate gives no
    decay. The other arguments are those of Recurrent."""

    def __init__(self, shape: MixerShape, *, bidirectional: bool = False, **options: Any) -> None:
        super().__init__(shape, **options)
        self.bidirectional = bidirectional

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        if not self.bidirectional:
            return super().mix(x, past, call)
        return self._run(x, {}, call, read_all)[0], {}

    def naive(self, x: Tensor) -> Tensor:
        if not self.bidirectional:
            return super().naive(x)
        return self._run(x, {}, self.whole(x), weigh_all)[0]


def fold(q: Tensor, kv_heads: int) -> Tensor:
    """q `(B, H, N, F)` as `(B, Hk, H / Hk * N, F)`: the queries of a group become rows over their key/value head."""
    return q.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def unfold(out: Tensor, n: int) -> Tensor:
    """Undoes `fold`: `(B, Hk, G * N, F)` as `(B, Hk * G, N, F)`."""
    return out.unflatten(2, (-1, n)).flatten(1, 2)


def read_all(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    normalise: Literal["sum"] | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """`q_i . sum_j k_j v_j^T`, divided by `q_i . sum_j k_j` with normalise; takes and gives what a scan does, without a state.

    Tokens that are not real come with keys and values of 0.
    """
    q, k, v = _prepared(q, k, v, log_decay, beta, scale)
    return unfold(bidir_linear(fold(q, k.shape[1]), k, v, normalise or "none"), q.shape[2]), None


def weigh_all(
    q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, beta: Tensor | None = None, scale: float | None = None,
    normalise: Literal["sum"] | None = None,
) -> tuple[Tensor, None]:  # fmt: skip
    """`read_all` with all N x N weights written out: its oracle."""
    q, k, v = _prepared(q, k, v, log_decay, beta, scale)
    weights = fold(q, k.shape[1]) @ k.mT
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return unfold(weights @ v, q.shape[2]), None


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    if log_decay is not None or beta is not None:
        raise ValueError("all tokens are read at once: there is no order in which something decays or is corrected")
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale), k.to(wide), v.to(wide)


class TokenSoftmaxGate(Gate):
    """Keys as logits: every channel is a softmax over all tokens; `CumulativeSoftmaxGate` read both ways."""

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        logits = call.masked(keys.to(torch.promote_types(keys.dtype, torch.float32)), -1e30)
        return Gated(None, logits.softmax(2).to(keys.dtype))
