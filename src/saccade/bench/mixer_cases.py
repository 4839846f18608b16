"""Cases of `mixer`: layers that train, beside softmax attention in the same stack.

  training step   forward and backward of a stack, always over as many tokens: sequences of 2K to 128K, fewer of them as they get longer.
                  A layer whose cost is linear takes the same time throughout; softmax does not.
  decoding step   one token after n others, by a stack whose state is there already: of the growing caches the first n tokens are random
                  (they are appended, not computed), recurrent states are those of a short prompt, as their size does not depend on n.

"GPU work" is a step recorded as a CUDA graph and replayed, or its launches queued ahead where it can't be recorded; "step" is what a user
waits for, the host's part included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from saccade.bench.case import Case, Contestant, Field, Run, Settings, Work
from saccade.bench.prefill_cases import MLP, random_model
from saccade.bench.prefill_inputs import Shape as PromptShape
from saccade.bench.step_cases import AHEAD_MS
from saccade.bench.timing import recorded
from saccade.cache.kv_store import KVStore
from saccade.core import MixerState
from saccade.evaluate.study import parse_contestant
from saccade.methods import build_mixer
from saccade.methods.stack import Stack
from saccade.ops import last_run

TOKENS = 131072  # of a training step
PROMPT = 64
MIXERS = ("lightning-attention", "deltanet", "kimi-linear(gate='token')", "kimi-linear", "softmax")
HYBRID = "kimi-linear*3,softmax"
WIDTH = MLP  # of the feed-forward layers, in channels: that of the Llama beside them


@dataclass(frozen=True)
class Shape:
    n: int
    batch: int = 1
    dim: int = 2048
    heads: int = 16
    kv_heads: int = 16
    layers: int = 2


def specs_of(text: str, layers: int) -> list[str]:
    """ "a*3,b" repeated up to so many layers, as checked specs. ValueError where it does not fit, or names no mixer."""
    return [build_mixer(spec).spec for spec in parse_contestant(text, layers)]


def _stack(text: str, shape: Shape, s: Settings) -> Stack:
    # made where it is used: a few billion random numbers take a host minutes
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if s.cuda else []), torch.device(s.device):
        torch.manual_seed(0)
        made = Stack(
            specs_of(text, shape.layers), dim=shape.dim, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.dim // shape.heads,
            width=int(WIDTH * shape.dim), max_length=shape.n + PROMPT,
        )  # fmt: skip
    return made.to(s.device, s.dtype)


def _training(text: str, shape: Shape, s: Settings) -> Field:
    stack, x = _stack(text, shape, s), s.normal(shape.batch, shape.n, shape.dim)
    tokens = shape.batch * shape.n
    pairs = 0.5 * shape.n * (shape.n + 1) * shape.batch

    def work(weights: int, softmax: int) -> Work:
        # a pair costs 4 operations a channel forward, and 2.5 times that backward
        return Work(flops=6.0 * weights * tokens + 14.0 * shape.dim * pairs * softmax, bytes=None, unit="FLOP")

    def step() -> Any:
        for p in stack.parameters():
            p.grad = None
        y, _ = stack(x, keep=False)
        y.float().square().mean().backward()
        return y

    def llama() -> Run:
        head = shape.dim // shape.heads
        model = random_model(PromptShape(shape.n, shape.heads, shape.kv_heads, head), shape.layers, s, hidden=shape.dim).model

        def call() -> Any:
            for p in model.parameters():
                p.grad = None
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]) if s.cuda else nullcontext():
                y = model(inputs_embeds=x, use_cache=False).last_hidden_state
                y.float().square().mean().backward()
            return y

        return Run(call=call, impl="sdpa")

    own = sum(p.numel() for p in stack.parameters())
    softmax = sum(spec.startswith("softmax") for spec in specs_of(text, shape.layers))
    run = partial(Run, call=step, impl=lambda: last_run().impl, note=f"{tokens:,} tokens a step")
    name = "Llama, cuDNN" if s.cuda else "Llama, SDPA"
    return Field(contestants=[
        Contestant(name="saccade", role="ours", work=work(own, softmax), checked=False, make=run),
        Contestant(name=name, role="dense", work=work(own, shape.layers), checked=False, make=llama),
    ])  # fmt: skip


def _stores(values: Any) -> Iterator[KVStore]:
    if isinstance(values, KVStore):
        yield values
    elif isinstance(values, dict):
        for one in values.values():
            yield from _stores(one)


def _decoding(text: str, shape: Shape, s: Settings) -> Field:
    def contestants(name: str, text: str, role: Any) -> list[Contestant]:
        @functools.cache
        def step_of() -> tuple[Callable[[], Tensor], str]:
            stack, x = _stack(text, shape, s).eval(), s.normal(shape.batch, PROMPT + 1, shape.dim)
            _, states = stack(x[:, :PROMPT])
            filled: list[MixerState | None] = [None if state is None else _after(state, shape.n, s) for state in states]
            holder = [filled]

            def step() -> Tensor:
                y, holder[0] = stack(x[:, PROMPT:], holder[0])
                return y

            size = sum(state.nbytes for state in filled if state is not None)
            return step, f"state of {size / 1e9:.2f} GB"

        def make(alone: bool) -> Run:
            step, note = step_of()
            return Run(call=(recorded(step) if alone else None) or step, impl=lambda: last_run().impl, note=note)

        return [
            Contestant(
                name=f"{name}, {what}", role=role, work=amount, checked=False, ahead_ms=AHEAD_MS if alone else 0.0,
                make=partial(make, alone),
            )
            for what, alone in ((("GPU work", True), ("step", False)) if s.cuda else (("step", False),))
        ]  # fmt: skip

    amount = Work(flops=None, bytes=2.0 * shape.batch * shape.n * shape.dim * shape.kv_heads / shape.heads * s.size, unit="byte")
    return Field(contestants=[*contestants(text, text, "ours"), *contestants("softmax", "softmax", "dense")])


def _after(state: MixerState, n: int, s: Settings) -> MixerState:
    """The state with caches as long as after n tokens."""
    for store in _stores(state.values):
        tail = store.layer.tail
        assert tail is not None
        k, v = (s.normal(*x.shape[:2], n - PROMPT, x.shape[3], dtype=x.dtype) for x in (tail.keys, tail.values))
        store.append(k, v, None)
    return MixerState(torch.full_like(state.position, n), state.values)


# -- cases ---------------------------------------------------------------------------------------------------------------


def training_case(text: str, shape: Shape, size: int = 2) -> Case:
    specs_of(text, shape.layers)
    # activations of a layer: about 14 times its input, and 3 feed-forward widths
    need = size * shape.batch * shape.n * shape.dim * shape.layers * (14 + 3 * WIDTH)
    return Case(
        family="training step", shape={**vars(shape), "mixer": text}, need=need, build=partial(_training, text, shape), grad=True
    )


def decoding_case(text: str, shape: Shape, size: int = 2) -> Case:
    specs_of(text, shape.layers)
    # keys and values of the softmax stack and of the hybrid, and a layer's once more while it grows
    need = 3.2 * shape.batch * shape.n * shape.dim * shape.kv_heads / shape.heads * size * shape.layers
    return Case(family="decoding step", shape={**vars(shape), "mixer": text}, need=need, build=partial(_decoding, text, shape))


def asked(mixers: list[str], lengths: list[int], *, layers: int | None, size: int, cuda: bool) -> list[Case]:
    """The training step of each mixer at each length, over as many tokens as the longest has."""
    longest = max(lengths)
    wide = {} if cuda else {"dim": 128, "heads": 2, "kv_heads": 2}
    return [
        training_case(m, Shape(n, max(1, longest // n), layers=layers or 2, **wide), size)
        for m in mixers or MIXERS for n in lengths
    ]  # fmt: skip


def cases(grid: str, cuda: bool) -> list[Case]:
    if not cuda:
        small = {"dim": 64, "heads": 2, "kv_heads": 2}
        training = [training_case(m, Shape(n, 512 // n, **small), 4) for m in MIXERS for n in (128, 512)]
        return [*training, decoding_case(HYBRID, Shape(4096, layers=4, **small), 4)]
    lengths = {"quick": (2048, 16384), "bars": (2048, 8192, 32768, 131072), "full": tuple(2048 << i for i in range(7))}[grid]
    training = [training_case(m, Shape(n, TOKENS // n)) for m in MIXERS for n in lengths]
    far = {"quick": (131072,), "bars": (2**20,), "full": (32768, 131072, 2**20)}[grid]
    wide = [Shape(n, batch, dim=4096, heads=32, kv_heads=8, layers=8) for n in far for batch in (1, 2)]
    return [*training, *(decoding_case(HYBRID, shape) for shape in wide)]
