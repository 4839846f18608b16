"""What a method makes of the layers of one dense run, where what it reads can't be told from a selection alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from saccade.attach import attach
from saccade.attach.capture import reading_session
from saccade.cache import KVLayer, PackedSegment, Rectangle
from saccade.core import LayerContext
from saccade.evaluate.contenders import Contender
from saccade.evaluate.replay import LayerReplay
from saccade.methods.prefill.deltallm import DeltaLLM
from saccade.parts.deltas import delta_code
from saccade.parts.sizes import resolve


@dataclass(frozen=True)
class Layer:
    """One layer of a dense run: q `(1, Hq, N, D)`, k `(1, Hk, N, D)`, v `(1, Hk, N, Dv)`, float32."""

    ctx: LayerContext
    q: Tensor
    k: Tensor
    v: Tensor


@torch.no_grad()
def dense_layers(model: PreTrainedModel, ids: Sequence[int]) -> list[Layer]:
    """Every layer with full attention, as it runs densely on a prompt."""
    found: list[Layer] = []

    def keep(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        found.append(Layer(ctx, q.float(), k.float(), v.float()))

    with reading_session(model, keep):
        model(input_ids=torch.tensor([list(ids)], device=next(model.parameters()).device), use_cache=False)
    return found


def rectangles(layer: KVLayer) -> list[Rectangle]:
    """All entries that a cache layer of batch 1 holds, decoded, oldest storage first."""
    assert layer.tail is not None
    parts = [s.read_row(0) if isinstance(s, PackedSegment) else s.read(0, s.length) for s in layer.segments]
    return [*parts, Rectangle(layer.tail.keys, layer.tail.values, layer.tail.side)]


def held(layer: KVLayer, heads: int, n: int) -> Tensor:
    """Which of a sequence's first n tokens a cache layer has an entry of: `(heads, n)` bool."""
    parts = rectangles(layer)
    marked = torch.zeros(heads, n + 1, dtype=torch.bool, device=parts[0].keys.device)
    for part in parts:
        places = part.side["positions"][0].long()
        here = torch.ones_like(places, dtype=torch.bool) if part.valid is None else part.valid[0]
        # slots that hold nothing go to the spare column
        marked.scatter_(1, torch.where(here & (places < n), places, n).expand(heads, -1), True)
    return marked[:, :n]


@torch.no_grad()
def left_in_model(model: PreTrainedModel, one: Contender, ids: Sequence[int]) -> dict[int, Tensor]:
    """What the model's cache holds when a prompt has ended, bool `(Hk, N, N)` by layer, the same for every query.

    For policies that look at more than one layer's queries and keys: at hidden states, or at the tokens themselves.
    """
    methods: dict[str, Any] = one.methods
    with attach(model, plan=one.plans, **methods) as session:
        batch = torch.tensor([list(ids)], device=next(model.parameters()).device)
        cache = model(input_ids=batch, use_cache=True).past_key_values
        session.compress(cache)
        heads = int(model.config.get_text_config(decoder=True).num_key_value_heads)
        marks = {i: held(layer, heads, len(ids)) for i, layer in enumerate(cache.layers) if isinstance(layer, KVLayer)}
    return {i: mark[:, None].expand(-1, len(ids), -1) for i, mark in marks.items()}


@torch.no_grad()
def read_in_steps(layers: Sequence[Layer], one: Contender, prompt: int) -> dict[int, Tensor]:
    """Which keys each query really weighs, bool `(Hq, N, N)` by layer: `prompt` tokens at once, the rest one by one.

    Attention is linear in the values, so with unit vectors for values its output is the weights themselves: however a method stores
    entries, where it fetches them from and in how many passes it reads them. All layers take a step before the next one comes, since
    layers may hand choices on.
    """
    shared: dict[int, dict[Any, Any]] = {}
    replays: list[LayerReplay] = []
    for layer in layers:
        n = layer.k.shape[2]
        units = torch.eye(n, device=layer.k.device).expand(1, layer.k.shape[1], n, n)
        replay = LayerReplay(layer.ctx, layer.q, layer.k, units, one, shared)
        replay.layer.leader = replays[0].layer if replays else None
        replays.append(replay)
    rows = [[replay.feed(0, prompt)[0] > 0] for replay in replays]
    n = layers[0].k.shape[2]
    if prompt < n:
        for replay in replays:
            replay.close()
    for place in range(prompt, n):
        for replay, own in zip(replays, rows, strict=True):
            own.append(replay.feed(place, place + 1)[0] > 0)
    return {layer.ctx.layer: torch.cat(own, 1) for layer, own in zip(layers, rows, strict=True)}


def sent(method: DeltaLLM, layer: Layer) -> Tensor:
    """The share of each key's channels that are sent anew, `(Hk, N)`; keys that are in every later query's window are read whole."""
    n = layer.k.shape[2]
    moved = delta_code(layer.k[0, :, : max(0, n - resolve(method.window, n))], method.theta, method.restart) != 0
    return pad(moved.float().mean(-1), (0, n - moved.shape[1]), value=1.0)


def sent_shares(method: DeltaLLM, layer: Layer) -> Tensor:
    """The share of each key's channels that a query works on, `(Hk, N, N)`: all in its window, of older keys those sent anew."""
    old = sent(method, layer)
    places = torch.arange(old.shape[1], device=old.device)
    near = places.unsqueeze(1) - places < resolve(method.window, old.shape[1])
    return torch.where(near, 1.0, old.unsqueeze(1))
