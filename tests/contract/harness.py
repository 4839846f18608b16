"""Running a registered method, whatever its kind, on a tiny model."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import saccade
from saccade.attach import Session
from saccade.core import Calibrated, Info, Method, Plan, format_spec
from saccade.methods import build, load_all
from tests.contract.models import DEVICE, tiny

SAME = 1e-6  # two ways of computing the same thing in float64 (scores that only choose may be float32)
METHODS = {slug: method for slug, method in load_all().items() if slug != "dense" and method.info.phase != "mixer"}


def info(slug: str) -> Info:
    return METHODS[slug].info


def sparse(slug: str) -> str:
    """The spec that is truly sparse on a short sequence."""
    return format_spec(slug, dict(info(slug).tiny))


def opened(slug: str) -> str:
    """The spec that equals dense attention."""
    return format_spec(slug, {**info(slug).tiny, **info(slug).opened})


def llama() -> PreTrainedModel:
    return tiny("llama", torch.float64)


def tokens(batch: int, n: int, seed: int = 1) -> Tensor:
    """Token ids `(batch, n)` without padding or special ids."""
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def untrained_plan(model: PreTrainedModel, method: Method) -> Plan:
    """A plan of random numbers for a method whose parts are trained: what holds for every plan holds for it."""
    from saccade.methods.cache.adore import Adore
    from saccade.methods.cache.dynamic_llava import DynamicLlava
    from saccade.train.attention_gates import attention_gates_plan, new_gates
    from saccade.train.gates import gate_shape, gates_plan
    from saccade.train.token_controller import controller_plan, new_controller
    from saccade.train.token_predictors import new_predictors, predictors_plan

    if method.info.slug == "attention-gate":
        gates = [gate._replace(w_o=20 * gate.w_o) for gate in new_gates(model, bias=0.0)]
        return attention_gates_plan(model, gates, method.spec)
    if isinstance(method, DynamicLlava):
        return predictors_plan(model, method, new_predictors(model, method, dim=16))
    if isinstance(method, Adore):
        return controller_plan(model, method, new_controller(model, dim=16, hidden=16))
    generator = torch.Generator().manual_seed(3)
    return gates_plan(model, torch.rand(gate_shape(model), generator=generator), method.spec)


@cache
def plan(family: str, spec: str, dtype: torch.dtype) -> Plan | None:
    """The calibration a method needs, made on random tokens; None when it needs none."""
    method = build(spec)
    if "calibration" not in method.info.needs:
        return None
    if not isinstance(method, Calibrated):
        return untrained_plan(tiny(family, dtype), method)
    return saccade.calibrate(tiny(family, dtype), spec, [tokens(2, 96, seed=9)])


def attached(spec: str, family: str = "llama", dtype: torch.dtype = torch.float64, when: str = "prompt") -> Session:
    """`attach` with the method in its place and its plan, on the tiny model of a family."""
    phase = build(spec).info.phase
    return saccade.attach(tiny(family, dtype), **{phase: spec}, plan=plan(family, spec, dtype), when=when)


@torch.no_grad()
def logits(
    model: PreTrainedModel, ids: Tensor, *, steps: int = 0, chunks: list[int] | None = None, mask: Tensor | None = None
) -> Tensor:
    """Logits `(B, N, vocab)` of ids fed as a prompt (in chunks of the given lengths) and `steps` single tokens at the end."""
    model_cache = DynamicCache(config=model.config)
    prompt = ids.shape[1] - steps
    lengths = [*(chunks or [prompt]), *[1] * steps]
    assert sum(lengths) == ids.shape[1]
    out, begin = [], 0
    for length in lengths:
        seen = None if mask is None else mask[:, : begin + length]
        positions = None if mask is None else (seen.cumsum(-1) - 1).clamp(min=0)[:, begin:]
        step = model(ids[:, begin : begin + length], attention_mask=seen, position_ids=positions, past_key_values=model_cache)
        out.append(step.logits)
        begin += length
    return torch.cat(out, 1).double()


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, new: int = 8, **options: object) -> Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@cache
def dense_logits(family: str, dtype: torch.dtype, batch: int, n: int, steps: int) -> Tensor:
    return logits(tiny(family, dtype), tokens(batch, n), steps=steps)


def rounding(family: str, dtype: torch.dtype, batch: int, n: int, steps: int) -> float:
    """The largest error allowed: twice that of dense attention in the same dtype against float64, plus 1e-6."""
    exact = dense_logits(family, torch.float64, batch, n, steps)
    return 2 * error(dense_logits(family, dtype, batch, n, steps), exact) + 1e-6


def copied(model_cache: DynamicCache) -> DynamicCache:
    return copy.deepcopy(model_cache)
