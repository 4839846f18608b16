"""The two front doors: a model (`attach`) and bare tensors (`attention`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.calls import attention_calls
from saccade.attach.models import attention_modules
from saccade.attach.session import _SESSIONS, Session
from saccade.core import (
    CachePolicy,
    Decode,
    LayerContext,
    Method,
    Mixer,
    Phase,
    Plan,
    Prefill,
    PromptReduction,
    Selection,
    check_attention_inputs,
)
from saccade.methods import build, complete

PlanLike = Plan | str | Path


def attach(
    model: PreTrainedModel,
    prefill: str | Prefill | PromptReduction | None = None,
    decode: str | Decode | None = None,
    cache: str | CachePolicy | None = None,
    *,
    plan: PlanLike | Iterable[PlanLike] | None = None,
    when: Literal["prompt", "call"] = "prompt",
    impl: str = "auto",
    seed: int = 0,
    graph: int | None = None,
) -> Session:
    """Run a transformers model with these methods inside a `with` block; leaving it restores the model.

    prefill, decode, cache: a spec such as "snapkv(budget=0.25)", a Method, or None for dense.
    plan: calibration plans (or their files) for the methods that need one. impl: for attention over selections, see `attend`.
    when: "prompt" lets a cache policy act once the prompt has ended (before the first single token, or on
    `handle.compress()`), so a prompt in chunks gives what a prompt at once gives; "call" acts after every call, layer by layer, so
    that peak memory falls too. seed: for methods that sample.
    graph: on a GPU, single tokens are recorded as a CUDA graph that serves so many of them (128, say): the host launches a step at once.
    Tokens since the recording was made are then read in full beside what the methods choose or keep, and policies act when it ends.
    Steps that can't be recorded run as before, with a warning that says why; methods that can't be are refused here.

    Inside the block `model(**inputs)`, `model.generate(**inputs)`, chunked prefill, beam search, padding, later turns and prompt lookup
    work as they do without it. `handle.stats()` says what ran. Raises ValueError when the model or a combination can't be attached.
    """
    given = {"prefill": prefill, "decode": decode, "cache": cache}
    methods: dict[str, Any] = complete({place: build(m) for place, m in given.items() if m is not None and m != "dense"})
    plans = {p.slug: p for p in _plans(plan)}
    return Session(model, methods.get("prefill"), methods.get("decode"), methods.get("cache"), plans, when, impl, seed, graph)


def _plans(plan: PlanLike | Iterable[PlanLike] | None) -> list[Plan]:
    if plan is None:
        return []
    given = [plan] if isinstance(plan, Plan | str | Path) else list(plan)
    return [p if isinstance(p, Plan) else Plan.load(p) for p in given]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: str | Method = "dense",
    *,
    causal: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    plan: PlanLike | None = None,
    layer: int = 0,
    layers: int = 1,
    impl: str = "auto",
    seed: int = 0,
) -> Tensor:
    """Attention of q `(B, Hq, Nq, D)` over k, v `(B, Hk, Nk, D)` by a prefill or decode method: `(B, Hq, Nq, Dv)`.

    The queries are the last Nq positions. Decode methods take one query (Nq = 1) and index k first. `layer` of `layers` matters to
    methods that treat layers differently. Cache policies need a model and are refused here. `saccade.last_run()` says what ran.
    """
    layout = check_attention_inputs(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    chosen = None if method == "dense" else build(method)

    phase: Phase = "decode" if isinstance(chosen, Decode) and q.shape[2] == 1 else "prefill"
    partial = attention_calls(phase, scale=factor, softcap=softcap, impl=impl, causal=causal)

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return partial(q, k, v, selection, **{"return_lse": False, **options}).out

    if chosen is None:
        return run(q, k, v, None)
    if not causal:
        raise ValueError(f"{chosen.info.slug} is a method for causal attention: leave causal on")
    plans = _plans(plan)
    if "calibration" in chosen.info.needs and not plans:
        raise ValueError(f"{chosen.info.slug} needs a calibration plan: pass plan=")
    ctx = LayerContext(
        layer=layer, layers=layers, layout=layout, scale=factor, softcap=softcap, attend=run, partial=partial, phase=phase,
        seen=k.shape[2], plan=plans[0] if plans else None, plans={p.slug: p for p in plans}, seed=seed,
    )  # fmt: skip
    if isinstance(chosen, PromptReduction):
        raise ValueError(f"{chosen.info.slug} shortens a model's prompt: use saccade.attach(model, prefill={chosen.spec!r})")
    if isinstance(chosen, Prefill) and phase == "prefill":
        return chosen.attend(ctx, q, k, v)
    if isinstance(chosen, Decode):
        if q.shape[2] != 1:
            raise ValueError(f"{chosen.info.slug} is a decode method and takes one query, not {q.shape[2]}")
        if chosen.layer_policy(layer, layers) == "dense":
            return run(q, k, v, None)
        chosen.observe(ctx, k, v, 0)
        return chosen.attend(ctx, q, k, v)
    if isinstance(chosen, Mixer):
        raise ValueError(f"{chosen.info.slug} is a layer with weights: make it with saccade.mixer({chosen.spec!r}, dim=, heads=)")
    raise ValueError(f"{chosen.info.slug} changes a model's cache: use saccade.attach(model, cache={chosen.spec!r})")


def memory(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of storage held by an attached model's cache after its last call: "kv" and "index" (positions, scores, indices)."""
    for module in attention_modules(model):
        session = _SESSIONS.get(module)
        if session is not None:
            stats = session.stats()
            return {"kv": stats.kv_bytes, "index": stats.index_bytes}
    raise ValueError("this model is not attached: memory is measured inside `with saccade.attach(model, ...)`")
