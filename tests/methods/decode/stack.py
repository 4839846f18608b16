"""A stack of attention layers without a model: every layer has its own q, k, v, and layer policies act as in an attached model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tests.methods.decode.harness import best, logits, needle, tensors
from torch import Tensor

from saccade.attach.calls import attention_calls
from saccade.attach.stats import computed_pairs
from saccade.core import Decode, HeadLayout, LayerContext, Partial, Plan, Selection

Layer = tuple[Tensor, Tensor, Tensor]


class Step(NamedTuple):
    """What one layer did with one query. pairs: scores computed, the mean over heads. published: None where it published nothing."""

    out: Tensor
    pairs: float
    published: Selection | None


def stack_context(
    layer: int, layers: int, q: Tensor, k: Tensor, v: Tensor, shared: dict[str, Any], pairs: list[float], **more: Any
) -> LayerContext:
    """The context of one layer in decoding; what is computed is appended to `pairs`."""
    scale = q.shape[-1] ** -0.5
    call = attention_calls("decode", scale=scale, softcap=more.get("softcap"), impl="auto")

    def partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        pairs.append(computed_pairs(q.shape[2], k.shape[2], selection, options))
        return call(q, k, v, selection, **options)

    def attend(*given: Any, **options: Any) -> Tensor:
        return partial(*given, **{"return_lse": False, **options}).out

    settings: dict[str, Any] = {"seen": k.shape[2], **more}
    return LayerContext(
        layer=layer, layers=layers, layout=HeadLayout.of(q, k, v), scale=scale, attend=attend, partial=partial, count=pairs.append,
        phase="decode", shared=shared, **settings,
    )  # fmt: skip


def run_stack(method: Decode, layers: Sequence[Layer], plan: Plan | None = None, **more: Any) -> list[Step]:
    """One query through all layers."""
    shared: dict[str, Any] = {}
    steps = []
    for number, (q, k, v) in enumerate(layers):
        pairs: list[float] = []
        ctx = stack_context(number, len(layers), q, k, v, shared, pairs, plan=plan, **more)
        policy = method.layer_policy(number, len(layers))
        if isinstance(policy, int) or policy == "dense":
            out = ctx.attend(q, k, v, ctx.published(policy) if isinstance(policy, int) else None)
        else:
            method.observe(ctx, k, v, 0)
            out = method.attend(ctx, q, k, v)
        steps.append(Step(out, sum(pairs), shared.get("selections", {}).get(number)))
    return steps


def random_stack(depth: int, batch: int = 2, heads: int = 6, kv_heads: int = 2, n: int = 90, dim: int = 16) -> list[Layer]:
    return [tensors(batch, heads, kv_heads, n, dim, seed=layer) for layer in range(depth)]


def planted_stack(places: Sequence[Sequence[int]], n: int = 200, dim: int = 32, heads: int = 4, kv_heads: int = 2) -> list[Layer]:
    """Layers whose heads all put nearly all their attention on the given positions, one list a layer."""
    layers = []
    for layer, chosen in enumerate(places):
        q, k, v = tensors(1, heads, kv_heads, n, dim, seed=layer)
        q[:, :] = q[:, :1]
        direction = q[0, 0, 0] / q[0, 0, 0].norm()
        k[:, :, list(chosen)] = 0.1 * k[:, :, list(chosen)] + direction * 14 * dim**0.5 / float(q[0, 0, 0].norm())
        layers.append((q, k, v))
    return layers


def dense(layer: Layer) -> Tensor:
    """`(B, Hq, 1, Dv)`."""
    q, k, v = layer
    weights = (logits(q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights.unflatten(1, (k.shape[1], -1)) @ v).flatten(1, 2).unsqueeze(2)


def over(layer: Layer, mask: Tensor) -> Tensor:
    """Attention over the keys in `mask (B, Hq, n)` alone."""
    q, k, v = layer
    weights = (logits(q, k) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights.unflatten(1, (k.shape[1], -1)) @ v).flatten(1, 2).unsqueeze(2)


def listed(selection: Selection, heads: int) -> Tensor:
    """`(B, heads, n)` bool: the keys that one query reads."""
    mask = selection.dense_mask()[:, :, 0]
    return mask.repeat_interleave(heads // mask.shape[1], 1)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def pocket_stack() -> list[Layer]:
    """The pocket model's layers at the last byte of a needle's question, in float64."""
    return [(x.q[:, :, -1:].double(), x.k.double(), x.v.double()) for x in needle().layers]


def top_recall(steps: Sequence[Step], layers: Sequence[Layer], layer: int, source: int, count: int) -> float:
    """Share of the `count` best keys of each head of a layer that another layer's selection names."""
    q, k, _ = layers[layer]
    chosen = steps[source].published
    assert chosen is not None
    true = best(logits(q, k), count)
    return float((listed(chosen, q.shape[1]) & true).sum() / true.sum())
