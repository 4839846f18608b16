"""How a compressed prompt changes what the pocket model expects next."""

from __future__ import annotations

from functools import cache

import torch
from tests.methods.cache.needles import pocket, streams
from torch import Tensor
from transformers import DynamicCache

import saccade

PROMPT, AFTER = 768, 48


@cache
def read(method: str | None) -> tuple[Tensor, int]:
    """Log probabilities of the tokens after a compressed prompt of ordinary text, `(3, AFTER, vocab)`, and the cache's bytes at its end."""
    model, ids = pocket(), streams(3, PROMPT + AFTER - 1, seed=1)
    store = DynamicCache(config=model.config)
    with saccade.attach(model, cache=method) as handle, torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=store)
        handle.compress(store)
        size = handle.stats().kv_bytes
        return model(ids[:, PROMPT:], past_key_values=store).logits.log_softmax(-1), size


def divergence(method: str) -> float:
    """Kullback-Leibler divergence from what the model expects with the full cache, bits per byte."""
    dense, other = read(None)[0], read(method)[0]
    return float((dense.exp() * (dense - other)).sum(-1).mean()) / 0.6931


def size(method: str | None) -> int:
    """Bytes of keys and values after the prompt's compression."""
    return read(method)[1]
