"""What the cases of `step` are about: a cache's sizes, a method that decodes, its plans, and a model for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from saccade.attach import calibrate
from saccade.bench.case import Settings
from saccade.bench.prefill_cases import random_model
from saccade.bench.prefill_inputs import Shape as PromptShape
from saccade.core import CachePolicy, Decode, Method, Plan
from saccade.methods import build

LAST = 64  # tokens of the prompt that are run, for policies that look at queries
CALIBRATION = (2, 512)  # random tokens for methods with a plan


@dataclass(frozen=True)
class Shape:
    n: int
    batch: int = 8
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    layers: int = 32

    def cache_bytes(self, size: int) -> float:
        return 2.0 * self.batch * self.kv_heads * self.n * self.dim * size * self.layers

    @property
    def prompt(self) -> PromptShape:
        return PromptShape(self.n, self.heads, self.kv_heads, self.dim)


def decoding(spec: str) -> Decode | CachePolicy:
    """The method of a spec, if it acts in decoding. ValueError for others."""
    method = build(spec)
    if not isinstance(method, Decode | CachePolicy):
        raise ValueError(f"{method.info.slug} acts in the {method.info.phase} phase: bench step takes decode and cache methods")
    return method


def plans_of(method: Method, shape: Shape, s: Settings, model: Any = None) -> dict[str, Plan]:
    """Plans made on `model`, else on a small one of the shape's heads with random weights, which is enough for times."""
    if "calibration" not in method.info.needs:
        return {}
    model = random_llama(replace(shape, n=2048), s, hidden=8 * shape.heads) if model is None else model
    ids = torch.randint(3, 64, CALIBRATION, generator=s.generator(), device=s.device)
    return {method.info.slug: calibrate(model, method, [ids[:1], ids[1:]])}


def random_llama(shape: Shape, s: Settings, hidden: int) -> Any:
    return random_model(shape.prompt, shape.layers, s, hidden=hidden)
