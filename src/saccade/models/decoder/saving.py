"""A decoder's cache on disk: a prompt that was read once goes on in another process, at the size of its states."""

from __future__ import annotations

from pathlib import Path

from transformers import DynamicCache
from transformers.cache_utils import Cache

from saccade.cache.state_layer import StateLayer
from saccade.core import fingerprint
from saccade.core.storage import read, write
from saccade.models.decoder.model import SaccadeForCausalLM

SCHEMA = "saccade.decoder-cache/1"


def save_cache(path: str | Path, cache: Cache, model: SaccadeForCausalLM) -> Path:
    """Write the states of `cache` as one safetensors file. ValueError for an empty cache and for one of another kind of model."""
    states = [layer.state if isinstance(layer, StateLayer) else None for layer in cache.layers]
    if not states or any(state is None for state in states):
        raise ValueError("there are no states to save: run the model on a prompt and keep its past_key_values")
    facts = {"fingerprint": fingerprint(model), "layers": model.config.specs, "tokens": int(cache.get_seq_length())}
    return write(path, SCHEMA, facts, states)


def load_cache(path: str | Path, model: SaccadeForCausalLM) -> DynamicCache:
    """The cache that `save_cache` wrote, on the model's device, to be passed as `past_key_values`.

    ValueError for a cache of a model with other weights, and for a damaged file.
    """
    facts, states = read(path, SCHEMA, next(model.parameters()).device)
    if facts.get("fingerprint") != fingerprint(model) or facts.get("layers") != model.config.specs:
        raise ValueError(f"{path} holds a cache of another model ({', '.join(facts.get('layers', []))}): load it with the one that made it")
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    for state in states:
        layer = StateLayer()
        layer.put(state, facts["tokens"])
        cache.layers.append(layer)
    return cache
