"""The mask function registered beside our attention function.

transformers builds one mask for all layers of a kind from the first such layer's sizes, which is wrong once layers differ in length.
So our mask function builds nothing: it returns the padding it was given and remembers the call, and each layer works from its own
cache layer's positions. A layer that is left alone gets the mask its own implementation would have had, built on first use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, eager_mask

_ATTRIBUTE = "_saccade_mask_call"


class MaskCall:
    """One call of transformers' mask interface, to be carried out later or never."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._built: dict[str, Tensor | None] = {}

    @property
    def plainly_causal(self) -> bool:
        """Nothing but causality and padding: no packed sequences, no bidirectional blocks."""
        return self._arguments["mask_function"] is causal_mask_function

    def build(self, implementation: str) -> Tensor | None:
        """The mask that `implementation` would have been given."""
        if implementation not in self._built:
            known = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
            function = known.get(implementation, eager_mask)
            self._built[implementation] = function(**self._arguments)
        return self._built[implementation]


def remember_mask(batch_size: int, q_length: int, kv_length: int, **arguments: Any) -> Tensor:
    """transformers' mask interface: a tensor that stands for the call."""
    padding = arguments.get("attention_mask")
    carrier = padding.clone() if padding is not None else torch.ones(batch_size, 1, dtype=torch.bool, device=arguments.get("device"))
    call = MaskCall({"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, **arguments})
    setattr(carrier, _ATTRIBUTE, call)
    return carrier


def mask_call(mask: Tensor | None) -> MaskCall:
    """The remembered call; ValueError when the model brought a mask of its own."""
    call = getattr(mask, _ATTRIBUTE, None)
    if call is None:
        given = "no mask" if mask is None else f"a mask of shape {tuple(mask.shape)}"
        raise ValueError(
            f"this model handed {given} to attention without building it through transformers' mask interface: "
            "an attached model takes 2-D attention masks (batch, tokens) only"
        )
    return call
