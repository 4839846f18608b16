"""What storing entries in another form does to them and to attention: for methods that choose no keys.

Every layer of a dense run is fed to the method in bfloat16, the prompt ends, and the entries are read back. Queries and all that is not
stored stay as they were, so a difference is the storage's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from saccade.cache import Segment
from saccade.cache.factored import FactoredSegment
from saccade.cache.parted import PartedSegment
from saccade.cache.rotated import RotatedSegment
from saccade.evaluate.contenders import Contender
from saccade.evaluate.gallery_layers import Layer, rectangles
from saccade.evaluate.maps import as_bytes, log_scaled
from saccade.evaluate.replay import LayerReplay

STORED = torch.bfloat16
FULL_BITS = 16
PARTS = ("key", "value")


@dataclass(frozen=True)
class Stored:
    """A layer's entries as the cache gives them back: keys `(Hk, N, D)`, values `(Hk, N, Dv)`, float32; held `(Hk, N)` bool, which there
    are. bits `(2, Hk, N)`: of a number of each key and value. nbytes: of all entries."""

    keys: Tensor
    values: Tensor
    held: Tensor
    bits: Tensor
    nbytes: int


@dataclass(frozen=True)
class Change:
    """Means over layers and heads. share: bytes held, of those of the same entries in full. moved: attention that lies elsewhere (half the
    sum of differences of a query's weights). error: relative error of the outputs."""

    share: float
    moved: float
    error: float


@torch.no_grad()
def encoded(layers: Sequence[Layer], one: Contender, places: Sequence[tuple[int, int]], pool: int) -> tuple[list[dict[str, Any]], Change]:
    """For the heads (layer, query head) at `places`, in their order: pooled maps before and after, and what each token's entry is.

    A head's dict has "layer", "head", "kv_head", "size"; "map", "decoded": as in a result's "attention" part; "bits" and "error" of "key"
    and "value": bytes for each pooled token, of `bit_level` and of the entry's norm.
    """
    heads: dict[tuple[int, int], dict[str, Any]] = {}
    sums, count, nbytes, full = torch.zeros(2, dtype=torch.float64), 0, 0, 0
    for layer in layers:
        q = layer.q.to(STORED).float()[0]
        k, v = (x.to(STORED).float()[0] for x in (layer.k, layer.v))
        found = store(layer, one)
        nbytes, full = nbytes + found.nbytes, full + (k.numel() + v.numel()) * STORED.itemsize
        errors = torch.stack([relative(found.keys, k), relative(found.values, v)]).masked_fill(~found.held, 1.0)
        group = q.shape[0] // k.shape[0]
        for head in range(q.shape[0]):
            own = head // group
            every = torch.ones_like(found.held[own])
            before = weights(q[head], k[own], every, layer.ctx.scale, layer.ctx.softcap)
            after = weights(q[head], found.keys[own], found.held[own], layer.ctx.scale, layer.ctx.softcap)
            out, changed = before @ v[own], after @ found.values[own]
            sums += torch.tensor([float((after - before).abs().sum(-1).mean()) / 2, float((changed - out).norm() / out.norm())])
            count += 1
            if (layer.ctx.layer, head) in places:
                heads[layer.ctx.layer, head] = {
                    "layer": layer.ctx.layer, "head": head, "kv_head": own, "size": len(before) // pool,
                    "map": as_bytes(_pooled(before, pool)), "decoded": as_bytes(_pooled(after, pool)),
                    "bits": {name: by_token(bit_level(found.bits[i, own]), pool) for i, name in enumerate(PARTS)},
                    "error": {name: by_token(errors[i, own], pool) for i, name in enumerate(PARTS)},
                }  # fmt: skip
    moved, error = (sums / count).tolist()
    return [heads[place] for place in places], Change(nbytes / full, moved, error)


def store(layer: Layer, one: Contender) -> Stored:
    """The entries of a prompt that has ended, as the method's cache gives them back."""
    replay = LayerReplay(layer.ctx, layer.q.to(STORED), layer.k.to(STORED), layer.v.to(STORED), one, {})
    heads, n = layer.k.shape[1:3]
    replay.feed(0, n)
    replay.close()
    keys, values = torch.zeros_like(layer.k[0]), torch.zeros_like(layer.v[0])
    there = torch.zeros(heads, n, dtype=torch.bool, device=keys.device)
    bits = torch.zeros(2, heads, n, device=keys.device)
    segments = replay.layer.segments
    parts = rectangles(replay.layer)
    for i, part in enumerate(parts):
        places = part.side["positions"][0].long().expand(heads, -1)
        sizes = bits_of(segments[i]) if i < len(segments) else torch.full((2, *places.shape), float(8 * part.keys.element_size()))
        for head in range(heads):
            here = slice(None) if part.valid is None else part.valid[0, head]
            at = places[head, here]
            keys[head, at], values[head, at] = part.keys[0, head, here].float(), part.values[0, head, here].float()
            there[head, at], bits[:, head, at] = True, sizes[:, head, here].to(bits)
    # of the part that still grows, without the room it has spare
    rest = sum(x.numel() * x.element_size() for x in (parts[-1].keys, parts[-1].values))
    return Stored(keys, values, there, bits, rest + sum(segment.kv_bytes for segment in segments))


@singledispatch
def bits_of(segment: Segment) -> Tensor:
    """Bits of a number, scales and outliers included, of each entry of a sealed segment of batch 1, in the order of its slots: `(2, H, n)`
    for keys and values. The default spreads a segment's bytes evenly."""
    whole = segment.read(0, segment.length)
    return torch.full((2, *whole.keys.shape[1:3]), 8 * segment.kv_bytes / (whole.keys.numel() + whole.values.numel()))


@bits_of.register
def _(segment: PartedSegment) -> Tensor:
    parts = []
    for part in segment.parts:
        heads = len(part.counts[0])
        sizes = [8 * x.nbytes / (heads * x.length * dim) for x, dim in zip((part.keys, part.values), part.dims, strict=True)]
        parts.append(torch.tensor(sizes)[:, None, None].expand(-1, heads, part.keys.length))
    order = segment.order[0].long().cpu()
    return torch.cat(parts, 2).gather(2, order.expand(2, parts[0].shape[1], -1))


@bits_of.register
def _(segment: FactoredSegment) -> Tensor:
    kinds = ((segment.content.keys, segment.content.key_maps.up), (segment.content.values, segment.content.value_maps.up))
    sizes = torch.tensor([8 * codes.nbytes / (codes.length * up.shape[0] * up.shape[-1]) for codes, up in kinds])
    return sizes[:, None, None].expand(-1, kinds[0][1].shape[0], segment.length)


@bits_of.register
def _(segment: RotatedSegment) -> Tensor:
    sizes = torch.zeros(2, segment.heads)
    dims = (segment.bases.key_mean.shape[-1], segment.bases.value_mean.shape[-1])
    for group in segment.groups:
        for i, (x, dim) in enumerate(zip((group.keys, group.values), dims, strict=True)):
            sizes[i, group.heads.cpu()] = 8 * x.element_size() * x.shape[-1] / dim
    return sizes.unsqueeze(-1).expand(-1, -1, segment.length)


def weights(q: Tensor, k: Tensor, held: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Causal attention of one head, `(N, N)`: q, k `(N, D)`; held `(N,)` bool, the keys that there are. A query without any has zeros."""
    logits = q @ k.mT * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = torch.ones_like(logits, dtype=torch.bool).tril() & held
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def relative(found: Tensor, x: Tensor) -> Tensor:
    """Relative error of each entry, of x `(H, n, D)`: `(H, n)`."""
    return (found - x).norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-9)


def bit_level(bits: Tensor) -> Tensor:
    """Bits of a number to 0 ... 1: 0 for none, then a step of 0.2 for each doubling from 1 bit to 16."""
    return ((bits.clamp(min=1e-3).log2() + 1) / 5).clamp(0, 1)


def _pooled(x: Tensor, pool: int) -> Tensor:
    n = len(x) // pool * pool
    return log_scaled(x[:n, :n].unflatten(0, (-1, pool)).sum(1).unflatten(1, (-1, pool)).sum(2) / pool)


def by_token(x: Tensor, pool: int) -> str:
    """Means `(N / pool,)` over runs of tokens, at most 1, of x `(N,)`."""
    return as_bytes(x[: len(x) // pool * pool].unflatten(0, (-1, pool)).mean(1).clamp(max=1.0))
