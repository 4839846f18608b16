"""Caches on disk: a compressed or prepared prompt outlives the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from saccade.attach.models import text_config
from saccade.cache import KVLayer
from saccade.core import fingerprint
from saccade.core.storage import read, write

SCHEMA = "saccade.cache/1"
# plain layers of transformers that a mixed model keeps beside the managed ones, and what they hold
_PLAIN = {DynamicLayer: ("keys", "values"), DynamicSlidingWindowLayer: ("keys", "values", "cumulative_length")}


def save_cache(path: str | Path, cache: Cache, model: PreTrainedModel, methods: dict[str, str]) -> Path:
    """Write `cache` as one safetensors file; ValueError when a layer of it can't be saved."""
    layers = [_packed(index, layer) for index, layer in enumerate(cache.layers)]
    facts = {"fingerprint": fingerprint(model), "model": type(model).__name__, "tokens": int(cache.get_seq_length()), "methods": methods}
    return write(path, SCHEMA, facts, layers)


def load_cache(path: str | Path, model: PreTrainedModel) -> DynamicCache:
    """The cache that `handle.save(path)` wrote, on the model's device, to be passed as `past_key_values` inside an `attach` block.

    Methods other than those it was made with make their indices anew. ValueError for a file of another model, and for a damaged one.
    """
    device = next(model.parameters()).device
    facts, layers = read(path, SCHEMA, device)
    if facts.get("fingerprint") != fingerprint(model):
        raise ValueError(f"{path} holds a cache of another model ({facts.get('model', 'unnamed')}): load it with the model that made it")
    cache = DynamicCache(config=text_config(model))
    if len(cache.layers) != len(layers):
        raise ValueError(f"{path} holds {len(layers)} layers, the model's cache has {len(cache.layers)}")
    cache.layers = [_unpacked(own, stored, device) for own, stored in zip(cache.layers, layers, strict=True)]
    return cache


def _packed(index: int, layer: Any) -> Any:
    if isinstance(layer, KVLayer):
        return layer
    names = _PLAIN.get(type(layer))
    if names is None:
        raise ValueError(f"layer {index} of the cache is a {type(layer).__name__}, which can't be saved")
    return {name: getattr(layer, name) for name in names} if layer.is_initialized else {}


def _unpacked(own: Any, stored: Any, device: torch.device) -> Any:
    if isinstance(stored, KVLayer):
        stored.device = device
        return stored
    if stored:
        keys: Tensor = stored["keys"]
        own.lazy_initialization(keys, stored["values"])
        for name, value in stored.items():
            setattr(own, name, value)
    return own
