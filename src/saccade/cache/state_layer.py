"""StateLayer: the state of a mixer as a layer of a transformers cache, next to KVLayers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from saccade.core import MixerState

RECORDED = 64  # states kept behind the newest while past ones are recorded


class StateLayer(CacheLayerMixin):
    """state: the MixerState after all tokens so far, None before the first. seen: tokens so far, padding included.

    A recurrent state can't be taken back. While past states are recorded (`activate_past_recording`, as assisted generation asks for),
    the model steps token by token through this layer and the last states are kept, so that `crop` finds the one it needs.
    """

    _layer_type = "saccade_state"  # under which a cache made from a config finds this class
    is_compileable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: MixerState | None = None
        self.seen = 0
        self._past: dict[int, MixerState] = {}
        self.is_initialized = False

    def put(self, state: MixerState, tokens: int) -> None:
        """Store the state after `tokens` more tokens."""
        self.seen += tokens
        self.state = state
        self.is_initialized = True
        if self.record_past and not state.croppable:
            self._past[self.seen] = state.copy() if state.stores else state
            for old in [place for place in self._past if place < self.seen - RECORDED]:
                del self._past[old]

    @property
    def steps(self) -> bool:
        """Whether the model has to take the last RECORDED tokens one by one, so that every state is seen."""
        return self.record_past and not (self.state is not None and self.state.croppable)

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.record_past or (self.state is not None and self.state.croppable)

    def activate_past_recording(self) -> None:
        """From now on keep the states that `crop` may ask for."""
        if not self.record_past and self.state is not None and not self.state.croppable:
            self._past = {self.seen: self.state.copy() if self.state.stores else self.state}
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` tokens. ValueError where the state before them is not known any more."""
        n = -int(tokens_to_remove)
        if n < 0:
            raise ValueError(f"crop({tokens_to_remove}) is not supported: give the number of tokens to remove as a negative number")
        if n == 0 or self.state is None:
            return
        if n >= self.seen:
            self.reset()
            return
        if self.state.croppable:
            self.state = self.state.crop(n)
        elif self.seen - n in self._past:
            self.state = self._past[self.seen - n]
        else:
            self.state.crop(n)  # says why it can't
        self.seen -= n
        self._past = {place: state for place, state in self._past.items() if place <= self.seen}

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a layer for a mixer's state holds no keys and values: it belongs to a model whose layers put their states in it")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a layer for a mixer's state holds no keys and values: it belongs to a model whose layers put their states in it")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self._rows(torch.arange(self.state.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self._rows(torch.arange(self.state.batch)[indices.cpu()])

    def _rows(self, rows: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.reorder(rows)
            self._past = {place: state.reorder(rows) for place, state in self._past.items()}

    def offload(self) -> None:
        raise ValueError("the state of a mixer stays on its device: use a cache without offloading")

    def prefetch(self) -> None:
        raise ValueError("the state of a mixer stays on its device: use a cache without offloading")

    @property
    def nbytes(self) -> int:
        """Bytes of the state, past ones that are recorded not counted."""
        return 0 if self.state is None else self.state.nbytes
