"""Whole models that write tokens: a Llama of the shape with random weights, projections and feed-forward layers included.

Every contestant writes TOKENS tokens one by one over a cache of its own that is already long, and grows by as many in each run:

  saccade            the method, each step launched from Python
  saccade, graph     the method, `attach(graph=TOKENS)`: one plain step, one that is recorded, the others replayed
  dense, dense graph the same without a method; and transformers' own, with its DynamicCache and its QuantizedCache (4 bits)

Times are of all TOKENS steps: tokens a second are `batch * TOKENS / seconds`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from saccade.attach import attach
from saccade.bench.case import Contestant, Field, Run, Settings, Skip, Work
from saccade.bench.step_shapes import LAST, Shape, decoding, plans_of, random_llama
from saccade.core import Decode
from saccade.ops import last_run

TOKENS = 64


def whole_model(spec: str, shape: Shape, s: Settings) -> Field:
    """The contestants of one method over caches of `shape.n` tokens."""
    from transformers import DynamicCache

    model = random_llama(shape, s, hidden=shape.heads * shape.dim)
    method = decoding(spec)
    plans = list(plans_of(method, shape, s, model).values())
    phase = "decode" if isinstance(method, Decode) else "cache"
    ids = torch.full((shape.batch, 1), 5, device=s.device)
    weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    amount = Work(flops=None, bytes=TOKENS * (weights * s.size + shape.cache_bytes(s.size)), unit="byte")

    def filled(make: Callable[[], Any]) -> Any:
        cache, generator = make(), s.generator()
        for index in range(shape.layers):
            k, v = (s.normal(shape.batch, shape.kv_heads, shape.n - LAST, shape.dim, generator=generator) for _ in range(2))
            cache.update(k, v, index)
        model(ids.expand(-1, LAST), past_key_values=cache, logits_to_keep=1)
        return cache

    def write(cache: Any) -> Any:
        out = None
        for _ in range(TOKENS):
            out = model(ids, past_key_values=cache).logits
        return out

    def plain(make: Callable[[], Any]) -> Run:
        return Run(call=partial(write, filled(make)), impl="sdpa")

    def dynamic() -> Any:
        return DynamicCache(config=model.config)

    def attached(**how: Any) -> Run:
        block = attach(model, **how, impl=s.impl)
        with block as handle:
            cache = filled(dynamic)
            model(ids, past_key_values=cache)
            stats = handle.stats()

        def run() -> Any:
            with block:
                return write(cache)

        whole = shape.cache_bytes(s.size)
        note = f"holds {stats.kv_bytes / whole:.1%} of the dense cache's bytes, and {stats.index_bytes / whole:.1%} beside them"
        return Run(call=run, impl=lambda: last_run().impl, note=note)

    def quantised() -> Run:
        from transformers import QuantizedCache
        from transformers.utils import is_optimum_quanto_available

        if not is_optimum_quanto_available():
            raise Skip("transformers' QuantizedCache needs optimum-quanto: pip install optimum-quanto")
        return plain(lambda: QuantizedCache(backend="quanto", config=model.config, nbits=4))

    def contestant(name: str, role: Any, make: Callable[[], Run]) -> Contestant:
        shared = None if role == "ours" else f"{name} {shape}"
        return Contestant(name=name, role=role, work=amount, make=make, checked=False, shared=shared)

    ours = {phase: method, "plan": plans}
    found = [contestant("saccade", "ours", lambda: attached(**ours))]
    found += [contestant("saccade, graph", "ours", lambda: attached(**ours, graph=TOKENS))] if s.cuda else []
    found.append(contestant("saccade dense", "dense", attached))
    found += [contestant("saccade dense, graph", "dense", lambda: attached(graph=TOKENS))] if s.cuda else []
    found += [contestant("transformers", "dense", lambda: plain(dynamic)), contestant("transformers, QuantizedCache", "peer", quantised)]
    return Field(contestants=found, note=f"{TOKENS} tokens; random weights")
