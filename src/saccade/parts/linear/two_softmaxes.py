"""Linear attention with a softmax on both sides: of queries over channels, of keys over tokens (efficient-attention, latte)."""

from __future__ import annotations

from typing import Any

from saccade.core import MixerShape
from saccade.parts.linear.both_ways import BothWays, TokenSoftmaxGate
from saccade.parts.linear.gates import CumulativeSoftmaxGate, Gate


def token_softmax(bidirectional: bool) -> Gate:
    """Every channel of the keys as a softmax over all tokens, or over the tokens so far."""
    return TokenSoftmaxGate() if bidirectional else CumulativeSoftmaxGate()


def two_softmaxes(shape: MixerShape, *, bidirectional: bool, **options: Any) -> BothWays:
    """`o_i = sum_c softmax_c(q_i) sum_j softmax_j(k_jc) v_j`: rows of weights are at least 0 and sum to 1. options: of Recurrent."""
    return BothWays(shape, **{"q_map": "softmax", "gate": token_softmax(bidirectional), "bidirectional": bidirectional, **options})
