"""What the tests of decode methods share: a context without a model, and the pocket model with a prompt already read."""

from __future__ import annotations

import copy
from functools import cache
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import Captured, capture
from saccade.core import Decode, HeadLayout, LayerContext, Plan, Selection
from saccade.evaluate.text import grammar
from saccade.train.text import NOUNS, insert_at_lines, needle_question, needle_sentence


def tensors(
    batch: int, heads: int, kv_heads: int, n: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q `(batch, heads, 1, dim)` and k, v `(batch, kv_heads, n, dim)`, standard normal."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, 1, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)]
    q, k, v = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def context(q: Tensor, k: Tensor, v: Tensor, plan: Plan | None = None) -> LayerContext:
    """The context of layer 2 of 8 after the keys."""

    def attend(*_: object) -> Tensor:
        raise AssertionError("a decode method chooses, it does not attend")

    return LayerContext(
        layer=2, layers=8, layout=HeadLayout.of(q, k, v), scale=q.shape[-1] ** -0.5, attend=attend, seen=k.shape[2], plan=plan
    )


def choose(method: Decode, q: Tensor, k: Tensor, v: Tensor, plan: Plan | None = None) -> Selection:
    """The method's selection for one query over keys that came at once."""
    ctx = context(q, k, v, plan)
    method.observe(ctx, k, v, 0)
    return method.select(ctx, q, k, v)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """`(B, Hq, n)`: q.k, without the scale."""
    return (q.squeeze(2).unflatten(1, (k.shape[1], -1)) @ k.mT).flatten(1, 2)


def recall(found: Tensor, true: Tensor) -> float:
    """Share of the true members (bool masks `(..., n)`) that were found."""
    return float((found & true).sum() / true.sum())


def best(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` highest of `(..., n)`."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, dim=-1).indices, True)


@cache
def pocket() -> PreTrainedModel:
    return saccade.pocket(torch.float32, "cpu")[0]


def ids_of(text: bytes) -> Tensor:
    return torch.tensor([[1, *(b + 3 for b in text)]])


class Prompt(NamedTuple):
    """A needle prompt of the pocket model: token ids, the answer, and a cache that holds all tokens but the last."""

    ids: Tensor
    answer: str
    cache: DynamicCache
    layers: list[Captured]


@cache
def needle(n: int = 2048, depth: float = 0.3, seed: int = 3) -> Prompt:
    rng = Random(seed)
    text, noun = grammar(), rng.choice(NOUNS)
    key, value = text.key(rng), str(rng.randrange(10**6, 10**7))
    question = needle_question(noun, key).encode()
    fact = needle_sentence(noun, key, value).encode()
    haystack = text.haystack(rng, n - 1 - len(question) - len(fact))
    ids = ids_of(insert_at_lines(haystack, [(depth, fact)]) + question)
    read = DynamicCache(config=pocket().config)
    with capture(pocket()) as layers, torch.no_grad():
        pocket()(ids[:, :-1], past_key_values=read)
    return Prompt(ids, value, read, layers)


def answer(prompt: Prompt, decode: str | Decode, plan: Plan | None = None) -> tuple[str, saccade.Stats]:
    """What the pocket model writes when the question's last byte and all that follows are decoded with a method."""
    with saccade.attach(pocket(), decode=decode, plan=plan) as handle, torch.no_grad():
        out = pocket().generate(
            prompt.ids, past_key_values=copy.deepcopy(prompt.cache), max_new_tokens=len(prompt.answer), do_sample=False
        )
        stats = handle.stats()
    return bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist() if b >= 3).decode(errors="replace"), stats
