"""Cases of `step`: one decoding step of whole methods over a cache that is already long.

The cache is filled with random keys and values, not by running a prompt, so that 128K tokens for 8 sequences take seconds. Budgets are
then what a method reads, but random keys have no structure to find: methods whose budget depends on the scores show their worst.
Every step appends its token, brings the method's index up to date, chooses and attends.

Decode methods run in as many layers as the model has, because some read everything in a few of them. To fit, the layers share the storage
of their keys and values (each has its own index and its own queries): one layer's cache is many times the L2 cache, so nothing is reused.

  attention    the attention calls of all layers, one after the other
  whole model  a Llama of the shape with so many layers and random weights writes tokens (see `token_cases`)

"GPU work" is that of a step recorded as a CUDA graph and replayed (of a step that can't be recorded, with its launches queued ahead);
"step" is what a user waits for, the host's part included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.attach.layercall import LayerCall
from saccade.attach.layers import LayerRunner
from saccade.bench import peers
from saccade.bench.case import Case, Contestant, Field, Run, Settings, Work
from saccade.bench.prefill_inputs import SHAPES
from saccade.bench.step_shapes import LAST, Shape, decoding, plans_of
from saccade.bench.timing import recorded
from saccade.bench.token_cases import whole_model
from saccade.cache import KVLayer
from saccade.core import CachePolicy, Decode, HeadLayout, Rotary
from saccade.methods import build
from saccade.ops import decode, last_run

AHEAD_MS = 40.0
STEPS = 1024  # that a case makes at most
LAYERS, FEW = 32, 8
METHODS = (
    "quest", "quest(reduce='group_max')", "double-sparsity", "double-sparsity(reduce='group_max')", "loki",
    "loki(budget=0.0625, dims=0.125, reduce='group_max')", "tidaldecode", "tidaldecode(reduce='group_max')", "less-is-more",
    "streaming-llm", "snapkv(budget=0.25)", "zipcache(salient_bits=4, other_bits=4)",
)  # fmt: skip


class Layers:
    """The managed layers of a model without the model: `step()` is one token through the attention of all."""

    def __init__(self, method: Decode | CachePolicy | None, shape: Shape, s: Settings) -> None:
        self.shape, self.scale = shape, shape.dim**-0.5
        plans = {} if method is None else plans_of(method, shape, s)
        self.runners = [
            LayerRunner(
                layer=index, layers=shape.layers, prefill=None, decode=method if isinstance(method, Decode) else None,
                policy=method if isinstance(method, CachePolicy) else None, plans=plans, when="prompt", impl=s.impl, seed=0,
                rotary=Rotary(torch.logspace(0, -5, shape.dim // 2, device=s.device)),
            )
            for index in range(shape.layers)
        ]  # fmt: skip
        generator = s.generator()

        def normal(heads: int, m: int) -> Tensor:
            return s.normal(shape.batch, heads, m, shape.dim, generator=generator)

        self.caches: list[KVLayer] = []
        for runner in self.runners:
            cache = KVLayer()
            cache.before_append = partial(runner.before_append, cache)
            if self.caches:
                cache.leader = self.caches[0]
            if self.caches and not isinstance(method, CachePolicy):
                cache.adopt_tail(self.caches[0], LAST + STEPS)
            else:
                cache.update(normal(shape.kv_heads, shape.n - LAST), normal(shape.kv_heads, shape.n - LAST))
            self.caches.append(cache)
        self.token = normal(shape.kv_heads, LAST), normal(shape.kv_heads, LAST)
        self.queries = [normal(shape.heads, LAST) for _ in self.runners]
        self.step()
        self.token = self.token[0][:, :, :1], self.token[1][:, :, :1]
        self.queries = [q[:, :, :1] for q in self.queries]
        self.step()

    def step(self) -> Tensor:
        """The same new token for all layers, with queries of their own."""
        shared: dict[str, Any] = {}
        out = self.token[0]
        for runner, cache, q in zip(self.runners, self.caches, self.queries, strict=True):
            keys, values = cache.update(*self.token)
            out = runner.run(LayerCall(q=q, k=keys, v=values, scale=self.scale, softcap=None, real=None, shared=shared), cache)
        return out

    def bytes(self) -> tuple[int, int]:
        """Of keys and values, and of everything kept beside them."""
        return sum(cache.kv_bytes for cache in self.caches), sum(cache.side_bytes for cache in self.caches)

    def density(self) -> float | None:
        pairs = [runner.stats.decode.density for runner in self.runners]
        known = [p for p in pairs if p is not None]
        return sum(known) / len(known) if known else None


def _attention(spec: str, shape: Shape, s: Settings) -> Field:
    method = decoding(spec)
    ours = Layers(method, shape, s)
    stored, beside = ours.bytes()
    density = ours.density()
    whole = shape.cache_bytes(s.size)
    amount = Work(flops=4.0 * shape.dim * shape.batch * shape.heads * shape.n * shape.layers, bytes=whole, unit="byte")
    note = f"holds {stored / whole:.1%} of the dense cache's bytes, and {beside / whole:.1%} beside them"

    def prepared(call: Callable[[], object], impl: Callable[[], str] | str, notes: str, alone: bool) -> Run:
        found = recorded(call) if alone else None
        said = "" if not alone or notes == "" else "; from a CUDA graph" if found else "; the step waits for the GPU, so queued ahead"
        return Run(call=found or call, impl=impl, note=notes + said)

    def contestants(name: str, call: Callable[[], object], impl: Callable[[], str] | str, shared: str | None) -> list[Contestant]:
        return [
            Contestant(
                name=f"{name}, {what}", role="dense" if shared else "ours", work=amount, checked=False, ahead_ms=AHEAD_MS if alone else 0.0,
                shared=shared, make=partial(prepared, call, impl, "" if shared else note, alone),
            )
            for what, alone in ((("GPU work", True), ("step", False)) if s.cuda else (("step", False),))
        ]  # fmt: skip

    @functools.cache
    def dense() -> Layers:
        """What dense attention reads: one layer's cache after the other, of its own where the method does not keep it all."""
        return Layers(None, shape, s) if isinstance(method, CachePolicy) else ours

    found = contestants("saccade", ours.step, lambda: last_run().impl, None)
    whose = f"{'own' if isinstance(method, CachePolicy) else 'shared'} {shape}"
    found += contestants("saccade dense", lambda: _dense(dense()), lambda: last_run().impl, whose)
    for name, call in _torch(dense, s):
        found += contestants(name, call, "sdpa", whose)
    return Field(contestants=found, density=density)


def _dense(layers: Layers) -> None:
    for q, cache in zip(layers.queries, layers.caches, strict=True):
        assert cache.tail is not None
        decode(q, cache.tail.keys, cache.tail.values)


def _torch(layers: Callable[[], Layers], s: Settings) -> list[tuple[str, Callable[[], object]]]:
    """torch's kernels over the same caches: the queries of a group become rows over their key/value head, so that nothing is repeated."""

    def inputs(q: Tensor, cache: KVLayer) -> peers.Inputs:
        assert cache.tail is not None
        k, v = cache.tail.keys, cache.tail.values
        return peers.Inputs(HeadLayout.of(q, k, v).to_groups(q.squeeze(2)), k, v, causal=False)

    kernels = {"FlashAttention-2": [SDPBackend.FLASH_ATTENTION], "cuDNN": [SDPBackend.CUDNN_ATTENTION], "SDPA": None}

    @functools.cache
    def given() -> list[peers.Inputs]:
        return [inputs(q, cache) for q, cache in zip(layers().queries, layers().caches, strict=True)]

    def all_layers(backends: list[SDPBackend] | None) -> None:
        with ExitStack() as stack:
            if backends is not None:
                stack.enter_context(sdpa_kernel(backends))
            for x in given():
                torch.nn.functional.scaled_dot_product_attention(x.q, x.k, x.v)

    return [(name, partial(all_layers, backends)) for name, backends in kernels.items() if s.cuda or backends is None]


# -- cases ---------------------------------------------------------------------------------------------------------------


def _need(spec: str, shape: Shape, size: int) -> float:
    whole = shape.cache_bytes(size)
    # an index is up to a quarter of the keys; a policy's layers have storage of their own, and the dense ones beside them
    return 2.6 * whole if isinstance(decoding(spec), CachePolicy) else whole * (2.2 / shape.layers + 0.13)


def attention_case(spec: str, shape: Shape, size: int = 2) -> Case:
    return Case(
        family="attention", shape={**vars(shape), "method": build(spec).spec}, need=_need(spec, shape, size),
        build=partial(_attention, spec, shape),
    )  # fmt: skip


def model_case(spec: str, shape: Shape, size: int = 2) -> Case:
    weights = shape.layers * 13.5 * (shape.heads * shape.dim) ** 2 * size
    return Case(
        family="whole model", shape={**vars(shape), "method": build(spec).spec}, need=weights + 3 * shape.cache_bytes(size),
        build=partial(whole_model, spec, shape),
    )  # fmt: skip


def layers_of(spec: str) -> int:
    """How many layers are timed unless told: all 32, of policies that store less as many as fit."""
    return FEW if isinstance(decoding(spec), CachePolicy) else LAYERS


def asked(
    methods: list[str], lengths: list[int], batches: list[int], *, shape: str, layers: int | None, whole: bool, size: int
) -> list[Case]:
    """One case for each length, batch and method; `whole`: of a whole model. ValueError for what is no shape or no method of decoding."""
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape} is not known: choose one of {', '.join(SHAPES)}")
    make = model_case if whole else attention_case
    specs = [decoding(spec).spec for spec in methods or METHODS]
    count = (lambda _: FEW) if whole else layers_of
    return [make(m, Shape(n, batch, *SHAPES[shape], layers or count(m)), size) for n in lengths for batch in batches for m in specs]


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        small = Shape(1024, 2, 6, 2, 64, 2)
        return [attention_case(m, small, 4) for m in METHODS[:4]] + [model_case(METHODS[0], small, 4)]
    if grid == "quick":
        return [attention_case(m, replace(Shape(32768), layers=layers_of(m))) for m in METHODS[:7]]
    lengths, batches = ((131072,), (8,)) if grid == "bars" else ((32768, 131072), (1, 8))
    shapes = [Shape(n, batch) for n in lengths for batch in batches]
    return [
        *(attention_case(m, replace(shape, layers=layers_of(m))) for shape in shapes for m in METHODS),
        *(model_case(m, replace(shape, layers=FEW)) for shape in shapes for m in METHODS),
    ]
