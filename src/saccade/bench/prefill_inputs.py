"""Queries, keys and values for prefill methods: real attention is sparse, random numbers are not, so a result says which it was.

"captured": the pocket model reads the text that comes with saccade, and what its attention layers saw is brought to the asked size.
  heads     key/value head h of H takes one of the pocket model's 16 (layer, head) pairs, spread evenly from the first layer to the
            last; its queries are that pair's three query heads in turn.
  channels  64 become 128 (or any multiple) by repeating q, k and v; q is divided by sqrt(repeats), so that with the scale
            `dim ** -0.5` every logit stays what it was.
  positions the first L tokens are the captured ones, L = 32768 on a GPU and 2048 on a CPU at most. Longer inputs go on with tokens
            64 ... L - 1 of the capture, again and again (the first 64 hold the attention sinks, which a text has once); q and k are
            turned on to their new positions by the model's own rotary angles. So distances are real, but content repeats: keys that
            a query looks up by content are found once in every repetition, and the local band does not grow.

"structured": made of parts with a known place. In each key/value head 1% of the keys are heavy columns (other ones in each head), every
  query looks at its neighbourhood of about 64 tokens, and the rest is noise; amplitudes follow the length, so that columns,
  neighbourhood and the rest hold about 0.6, 0.2 and 0.2 of the attention mass.

"random": independent normal numbers, for what a method costs where there is nothing to find.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from saccade.bench.case import Settings
from saccade.core import Budget, Mass, Rotary
from saccade.parts.probe import row_probabilities, strided_rows
from saccade.parts.rotary import turn

KINDS = ("captured", "structured", "random")
CAPTURE = {True: 32768, False: 2048}  # longest capture, on a GPU and on a CPU
SINKS = 64  # first captured tokens that a repetition leaves out
COLUMNS, NEIGHBOURHOOD = 0.01, 64
PROBED = 8  # rows on which the concentration is measured


@dataclass(frozen=True)
class Shape:
    """n tokens, heads query heads, kv_heads key/value heads of dim channels."""

    n: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def pairs(self) -> float:
        return self.heads * self.n * (self.n + 1) / 2


SHAPES = {"llama-8b": (32, 8, 128), "qwen-7b": (28, 4, 128), "pocket": (6, 2, 64)}


def make(kind: str, shape: Shape, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """q `(1, heads, n, dim)`, k and v `(1, kv_heads, n, dim)` to be used with the scale `dim ** -0.5`."""
    if kind == "captured":
        return _captured(shape, s)
    if kind == "structured":
        return _structured(shape, s)
    if kind != "random":
        raise ValueError(f"{kind!r} is no kind of inputs: choose one of {', '.join(KINDS)}")
    generator = s.generator()
    q, k, v = (s.normal(1, heads, shape.n, shape.dim, generator=generator) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    return q, k, v


def concentration(q: Tensor, k: Tensor, share: float = 0.9) -> float:
    """The smallest share of the visible keys that holds `share` of a row's attention, the mean over PROBED rows and all heads."""
    n = q.shape[2]
    rows = strided_rows(n, min(1.0, PROBED / n), q.device)
    counts = [
        Budget(Mass(share)).counts(row_probabilities(q, k, row, scale=q.shape[-1] ** -0.5)).double() / (int(row) + 1)
        for row in rows.split(1)
    ]
    return float(torch.stack(counts).mean())


# -- captured ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _capture(length: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Rotary]:
    """q `(16, 3, length, 64)`, k, v `(16, length, 64)` of the pocket model's (layer, head) pairs, and its rotary embedding."""
    from saccade.attach import capture
    from saccade.attach.rotary import rotary_of
    from saccade.evaluate.text import shipped_text
    from saccade.models.pocket import pocket

    model, tokenizer = pocket(dtype=dtype, device=device)
    ids = tokenizer(shipped_text()[: length + 16].decode("utf-8", "ignore"), return_tensors="pt").input_ids[:, :length]
    with capture(model) as layers, torch.no_grad():
        model(ids.to(device), use_cache=False, logits_to_keep=1)
    rotary = rotary_of(model, 0)
    if rotary is None:
        raise ValueError("the pocket model has no rotary embedding that can be turned on: its captures can't be made longer")
    q = torch.cat([layer.q.unflatten(1, (layer.k.shape[1], -1))[0] for layer in layers])
    k, v = (torch.cat([getattr(layer, name)[0] for layer in layers]) for name in ("k", "v"))
    return q, k, v, rotary


def _captured(shape: Shape, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    length = min(shape.n, CAPTURE[s.cuda])
    q, k, v, rotary = _capture(length, s.device, s.dtype)
    repeats, rest = divmod(shape.dim, q.shape[-1])
    if rest or not repeats:
        raise ValueError(f"captured inputs have heads of a multiple of {q.shape[-1]} channels, not of {shape.dim}: use --inputs structured")
    places = torch.arange(shape.n, device=s.device)
    source = torch.where(places < length, places, SINKS + (places - length) % max(1, length - SINKS))
    pairs = torch.arange(shape.kv_heads) * len(k) // shape.kv_heads if shape.kv_heads <= len(k) else torch.arange(shape.kv_heads) % len(k)
    group = shape.heads // shape.kv_heads
    made: list[list[Tensor]] = [[], [], []]
    # pair by pair: turning is done in float32
    for pair in pairs.tolist():
        mine = q[pair, torch.arange(group) % q.shape[1]]
        for found, x, has_angle in zip(made, (mine, k[pair], v[pair]), (True, True, False), strict=True):
            longer = x[..., source, :]
            if has_angle and shape.n > length:
                longer = turn(longer, places - source, rotary)
            found.append(longer.reshape(-1, *longer.shape[-2:]).repeat(1, 1, repeats))
    new_q, new_k, new_v = (torch.cat(found).unsqueeze(0) for found in made)
    return new_q / math.sqrt(repeats), new_k, new_v


# -- structured ----------------------------------------------------------------------------------------------------------


def _structured(shape: Shape, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    generator, n, dim = s.generator(), shape.n, shape.dim
    waves = max(1, dim // 4)  # pairs of channels whose products fall off with the distance
    noise = dim - 2 * waves - 1
    if noise < 1:
        raise ValueError(f"structured inputs need heads of at least 4 channels, not of {dim}")
    # noise lifts columns and the rest alike; the sum of the waves is near its amplitude close by, and far away one more noise of
    # variance near ** 2 / (2 * waves), which lifts the rest
    near = math.log(n / NEIGHBOURHOOD)
    near += near**2 / (4 * waves)
    # its exponential falls off faster than the sum itself, by the root of the amplitude
    near += math.log(near) / 2
    columns = math.log(2 / COLUMNS)
    frequency = s.normal(waves, generator=generator, dtype=torch.float32) / NEIGHBOURHOOD * math.sqrt(math.pi / 2)
    angles = torch.arange(n, device=s.device, dtype=torch.float32).unsqueeze(-1) * frequency
    wave = torch.cat([angles.cos(), angles.sin()], dim=-1)
    amplitude = math.sqrt(near * math.sqrt(dim) / waves)

    def side(heads: int, last: Tensor) -> Tensor:
        x = torch.empty(1, heads, n, dim, device=s.device, dtype=s.dtype)
        x[..., : 2 * waves] = amplitude * wave
        x[..., 2 * waves : -1] = s.normal(1, heads, n, noise, generator=generator)
        x[..., -1] = last
        return x

    heavy = torch.rand(1, shape.kv_heads, n, generator=generator, device=s.device) < COLUMNS
    q = side(shape.heads, torch.tensor(math.sqrt(dim), device=s.device))
    return q, side(shape.kv_heads, columns * heavy), s.normal(1, shape.kv_heads, n, dim, generator=generator)
