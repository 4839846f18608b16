"""Prompts and runs for the methods that store the cache in another form."""

from __future__ import annotations

from random import Random

import torch
from tests.contract.models import tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import Captured, capture
from saccade.evaluate.text import grammar
from saccade.train.text import insert_at_lines, needle_question, needle_sentence

OPTIONS = {"greedy": {}, "beams": {"num_beams": 3}, "lookup": {"prompt_lookup_num_tokens": 5}}


def tokens(batch: int, n: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def llama(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny("llama", dtype)


@torch.no_grad()
def run(model: PreTrainedModel, ids: Tensor, lengths: list[int], **options: Tensor) -> tuple[Tensor, DynamicCache]:
    """Logits of ids fed in calls of these lengths, and the cache."""
    cache = DynamicCache(config=model.config)
    out, begin = [], 0
    for m in lengths:
        out.append(model(ids[:, begin : begin + m], past_key_values=cache, **options).logits)
        begin += m
    return torch.cat(out, 1), cache


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: object) -> Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def spread_keys(batch: int = 1, heads: int = 2, n: int = 200, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keys whose channels have very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, n, dim, generator=generator) * torch.randn(heads, 1, dim, generator=generator).exp()).to(dtype)


def ids_of(text: bytes) -> Tensor:
    return torch.tensor([[1, *(b + 3 for b in text)]])


def needle(n: int, depth: float, seed: int) -> tuple[Tensor, str]:
    """A prompt of n tokens with a fact at `depth` and a question at its end, and the answer."""
    rng, text = Random(seed), grammar()
    key, value = text.key(rng), str(rng.randrange(10**5, 10**6))
    fact, question = needle_sentence("magic number", key, value).encode(), needle_question("magic number", key).encode()
    body = insert_at_lines(text.haystack(rng, n - 1 - len(fact) - len(question)), [(depth, fact)])
    return ids_of(body + question), value


def answered(ids: Tensor, value: str, *, dtype: torch.dtype = torch.float32, **methods: object) -> tuple[bool, float]:
    """Whether the pocket model finds the needle with `attach(**methods)`, and bytes of its cache as a share of full precision."""
    model, _ = saccade.pocket(dtype=dtype)
    with saccade.attach(model, **methods) as handle:
        out = generate(model, ids, len(value))
        stats = handle.stats()
    # 8 layers, 2 heads, keys and values of 64 dims
    dense = 8 * 2 * 2 * 64 * dtype.itemsize * stats.tokens_seen
    return bytes(max(int(t) - 3, 0) for t in out[0, ids.shape[1] :]).decode(errors="replace") == value, stats.kv_bytes / dense


def pocket_layers(n: int, seed: int = 3) -> list[Captured]:
    """Queries, keys and values of the pocket model's layers on n tokens of text."""
    model, _ = saccade.pocket(dtype=torch.float32)
    with torch.no_grad(), capture(model) as layers:
        model(ids_of(grammar().haystack(Random(seed), n - 1)))
    return layers
