"""What the tests of methods with sealed segments share: a prompt that is closed and decoded, without a model and with the pocket model."""

from __future__ import annotations

from typing import Any

import torch
from tests.methods.decode.harness import Prompt, pocket, tensors
from tests.methods.decode.stack import stack_context
from torch import Tensor

import saccade
from saccade.cache import Rectangle, Slots
from saccade.core import CachePolicy, LayerContext, Rotary
from saccade.parts.rotary import turn

ROTARY = Rotary(10000.0 ** (-torch.arange(16) / 16))


def rotated(batch: int, heads: int, kv_heads: int, n: int, seed: int = 0, dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """q `(batch, heads, 1, 32)` of the token after keys `(batch, kv_heads, n, 32)`, both turned to their places, and v."""
    q, k, v = tensors(batch, heads, kv_heads, n, dim, seed)
    return turn(q, n - 1, ROTARY), turn(k, torch.arange(n), ROTARY), v


def step_context(q: Tensor, k: Tensor, v: Tensor, pairs: list[float] | None = None, **more: Any) -> LayerContext:
    return stack_context(2, 8, q, k, v, {}, [] if pairs is None else pairs, **{"rotary": ROTARY, **more})


def closed(method: CachePolicy, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> tuple[LayerContext, Slots]:
    """The context of a step after a prompt that the method has closed, and what it left in full; q tells the head count."""
    slots = Slots(Rectangle(k, v, {"positions": torch.arange(k.shape[2], dtype=torch.int32).expand(*k.shape[:3])}))
    ctx = step_context(q, k, v, **more)
    method.compress(ctx, slots)
    ctx.segments = slots.sealed
    return ctx, slots


def told(prompt: Prompt, **methods: Any) -> tuple[str, saccade.Stats, Any]:
    """What the pocket model writes after a prompt that it reads with these methods, the stats, and its cache."""
    with saccade.attach(pocket(), **methods) as handle, torch.no_grad():
        cache = pocket()(prompt.ids[:, :-1], use_cache=True).past_key_values
        generate: Any = pocket().generate
        out = generate(prompt.ids, past_key_values=cache, max_new_tokens=len(prompt.answer), do_sample=False)
        stats = handle.stats()
    return bytes(b - 3 for b in out[0, prompt.ids.shape[1] :].tolist() if b >= 3).decode(errors="replace"), stats, cache


def on_host(cache: Any) -> int:
    return sum(getattr(segment, "host_bytes", 0) for layer in cache.layers for segment in layer.segments)
