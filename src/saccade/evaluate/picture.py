"""The attention of one prompt, pooled to small maps, and what each method selects of it: the viewer's data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach import attach
from saccade.attach.capture import reading_session
from saccade.core import Decode, LayerContext, Partial, PromptReduction, Selection
from saccade.evaluate.contenders import Contender
from saccade.evaluate.maps import as_bytes, log_scaled
from saccade.evaluate.replay import LayerReplay, probabilities

LENGTH = 1024
MAX_LAYERS = 8
MAX_HEADS = 8


@torch.no_grad()
def picture(
    model: PreTrainedModel, ids: Sequence[int], prompt: int, contenders: Sequence[Contender], text: str,
    only: Collection[tuple[int, int]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The "attention" part of a result: one dense run over `ids`, pooled, and the keys that each contender reads or
    keeps.

    prompt: where cache policies act (the end, or the end of the context in query-agnostic runs). text: the prompt's
    beginning. At most MAX_LAYERS layers and MAX_HEADS heads of each, evenly spread; of those `only` the pairs (layer, head) that are
    named. A contender that fails is left out and named, with the reason, under "failed".
    """
    pool = 8 if len(contenders) <= 5 else 16
    length = len(ids) // pool * pool
    layers: list[dict[str, Any]] = []
    shown = [contender for contender in contenders if not contender.dense]
    shared: dict[str, dict[int, dict[Any, Any]]] = {contender.spec: {} for contender in shown}
    failed: dict[str, str] = {}
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    chosen = set(_spread(count, MAX_LAYERS))
    shortened: dict[str, Tensor] = {}
    for contender in shown:
        if isinstance(contender.methods.get("prefill"), PromptReduction):
            try:
                shortened[contender.spec] = _columns(model, contender, list(ids[:length]))
            except Exception as error:  # as below
                failed[contender.spec] = f"{type(error).__name__}: {error}"

    def draw(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        masks: dict[str, Tensor] = {}
        for contender in shown:
            if contender.spec not in failed:
                if contender.spec in shortened:
                    masks[contender.spec] = shortened[contender.spec].expand(1, length, length)
                    continue
                try:
                    replay = LayerReplay(ctx, q, k, v, contender, shared[contender.spec])
                    masks[contender.spec] = _selected(replay, contender, min(prompt, length), length, pool)
                except Exception as error:  # the others still have their pictures
                    failed[contender.spec] = f"{type(error).__name__}: {error}"
        if ctx.layer in chosen:
            heads = [head for head in _spread(q.shape[1], MAX_HEADS) if only is None or (ctx.layer, head) in only]
            layers.append(layer_part(ctx, q[:, :, :length], k[:, :, :length], masks, pool, heads))

    device = next(model.parameters()).device
    with reading_session(model, draw):
        model(input_ids=torch.tensor([list(ids[:length])], device=device), use_cache=False)
    return {"prompt": text[:200], "length": length, "pool": pool, "layers": layers, "failed": failed}


def _selected(replay: LayerReplay, contender: Contender, prompt: int, length: int, pool: int) -> Tensor:
    """Which keys each query reads: `(H, length, length)` bool before causality, H = 1, Hk or Hq.

    Prefill: the selection that ran. Cache: the keys that were kept, the same for all queries (all keys after the
    prompt).
    Decode: what the last query of each pooled row selects among the keys up to it. Combinations: what all parts leave.
    """
    mask = torch.ones(1, 1, length, dtype=torch.bool, device=replay.k.device)
    if "prefill" in contender.methods or "cache" in contender.methods:
        replay.feed(0, prompt)
        selection = replay.chosen(prompt)
        if selection is not None:
            coverage = selection.coverage()[0].repeat_interleave(selection.block_q, 1)[:, :prompt]
            mask = torch.nn.functional.pad(coverage, (0, length - prompt, 0, length - prompt), value=True)
    if "cache" in contender.methods:
        replay.close()
        held = torch.nn.functional.pad(replay.held(prompt), (0, length - prompt), value=True)
        mask = _both(mask, held[:, None])
    decode = contender.methods.get("decode")
    if isinstance(decode, Decode):
        mask = _both(mask, _steps(replay, decode, length, pool).repeat_interleave(pool, 1))
    return mask.expand(-1, length, -1)


def _steps(replay: LayerReplay, decode: Decode, length: int, pool: int) -> Tensor:
    """Selections `(H, length / pool, length)` of the last query of each row, with an index that grows row by row."""
    ctx = replay.ctx
    context = LayerContext(
        layer=ctx.layer, layers=ctx.layers, layout=ctx.layout, scale=ctx.scale, attend=ctx.attend, partial=ctx.partial, softcap=ctx.softcap,
        phase="decode", rotary=ctx.rotary, plan=replay.runner.plans.get(decode.info.slug), seed=ctx.seed,
    )  # fmt: skip
    policy = decode.layer_policy(ctx.layer, ctx.layers)
    rows = []
    for begin in range(0, length, pool):
        end = begin + pool
        context.seen = end
        context.shared = replay.shared.setdefault(-end, {})
        if policy == "dense":
            row = torch.ones(1, end, dtype=torch.bool, device=replay.k.device)
        elif isinstance(policy, int):
            row = context.published(policy).coverage()[0, :, 0]
        else:
            decode.observe(context, replay.k[:, :, begin:end], replay.v[:, :, begin:end], begin)
            row = _one_step(decode, context, replay.q[:, :, end - 1 : end], replay.k[:, :, :end], replay.v[:, :, :end])
        rows.append(torch.nn.functional.pad(row, (0, length - end)))
    heads = max(row.shape[0] for row in rows)
    return torch.stack([row.repeat_interleave(heads // row.shape[0], 0) for row in rows], 1)


def _one_step(decode: Decode, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Which keys one query read, `(H, n)` bool: what its attention calls listed, or its selection where it gathers keys itself."""
    read: list[Tensor] = []

    def partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        if k.shape[2] == n:
            every = torch.ones(1, n, dtype=torch.bool, device=k.device)
            read.append(every if selection is None else selection.coverage()[0, :, 0])
        return ctx.partial(q, k, v, selection, **options)

    n = k.shape[2]
    recorded = replace(ctx, partial=partial, attend=lambda *given, **options: partial(*given, **options).out)
    decode.attend(recorded, q, k, v)
    if not read:
        return decode.select(ctx, q, k, v).coverage()[0, :, 0]
    heads = max(row.shape[0] for row in read)
    return torch.stack([row.repeat_interleave(heads // row.shape[0], 0) for row in read]).any(0)


def _columns(model: PreTrainedModel, contender: Contender, ids: list[int]) -> Tensor:
    """The tokens that stay of a prompt that the method shortens, `(length,)` bool: the keys that every query then reads."""
    method: Any = contender.methods["prefill"]
    with attach(model, prefill=method, plan=contender.plans) as session:
        given = torch.tensor([ids], device=next(model.parameters()).device)
        model(input_ids=given)
        stay = torch.ones(len(ids), dtype=torch.bool, device=given.device)
        if session.chosen is not None:
            stay = torch.zeros_like(stay).index_fill(0, session.chosen.places[0].to(stay.device), True)
    return stay


def layer_part(
    ctx: LayerContext, q: Tensor, k: Tensor, masks: dict[str, Tensor], pool: int, shown: Sequence[int], first: int = 0
) -> dict[str, Any]:
    """One layer's heads: maps, selections, mass and density.

    masks: by spec, `(H, N, N)` with H = 1, Hk or Hq: bool, or the share of a key that is read. first: the query from which on mass and
    density count.
    """
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    size = length // pool
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    cells = _pooled(visible, pool)
    heads = []
    for head in shown:
        own = k[:, head // group : head // group + 1]
        weights = probabilities(q[:, head : head + 1], own, 0, ctx.scale, ctx.softcap)[0]
        selections, mass, density = {}, {}, {}
        for spec, mask in masks.items():
            read = mask[head * mask.shape[0] // q.shape[1]] * visible
            selections[spec] = as_bytes(_pooled(read, pool) / cells.clamp(min=1))
            mass[spec] = float((weights * read)[first:].sum(-1).mean())
            density[spec] = float(read[first:].sum() / visible[first:].sum())
        heads.append({
            "head": head, "kv_head": head // group, "map": as_bytes(log_scaled(_pooled(weights, pool) / pool)),
            "size": size,
            "selections": selections, "mass": mass, "density": density,
        })  # fmt: skip
    return {"layer": ctx.layer, "heads": heads}


def _pooled(x: Tensor, pool: int) -> Tensor:
    """Sums over pool x pool tiles of a square matrix."""
    return x.float().unflatten(0, (-1, pool)).sum(1).unflatten(1, (-1, pool)).sum(2)


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Keys in both masks `(H, rows, keys)`; heads are repeated to the greater number."""
    heads = max(a.shape[0], b.shape[0])
    return a.repeat_interleave(heads // a.shape[0], 0) & b.repeat_interleave(heads // b.shape[0], 0)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spread, the first and last included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
