"""Constructed attention maps whose strong columns and diagonals are known, and needle prompts for the pocket model."""

from __future__ import annotations

import math
from typing import Any

import torch
from tests.methods.cache.needles import BYTE, pocket
from torch import Tensor

import saccade
from saccade.core import HeadLayout, LayerContext, Partial, Plan, Prefill, Selection
from saccade.ops import attend

FREQUENCIES = 256
DIM = 2 * FREQUENCIES + 8


def planted(
    n: int, columns: list[list[int]], offsets: list[list[int]], *, dtype: torch.dtype = torch.float32, column: float = 12.0,
    diagonal: float = 16.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q `(1, H, n, DIM)`, k, v `(1, 1, n, DIM)` for H query heads over one key/value head, to be used with scale 1.

    Head h gives the logit `column` to each key of columns[h], and `diagonal` (a little more or less) to the key `offsets[h]`
    before each query; all other logits are small.
    """
    generator = torch.Generator().manual_seed(0)
    frequencies = torch.rand(FREQUENCIES, generator=generator, dtype=torch.float64) * math.pi
    places = torch.arange(n, dtype=torch.float64)

    def waves(positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1) / FREQUENCIES

    # cos((i - o) w) cos(j w) + sin sin = cos((i - o - j) w): adds up over frequencies where j = i - o
    q = torch.zeros(1, len(columns), n, DIM, dtype=torch.float64)
    k = torch.zeros(1, 1, n, DIM, dtype=torch.float64)
    k[0, 0, :, : 2 * FREQUENCIES] = FREQUENCIES * waves(places)
    for head, (own_columns, own_offsets) in enumerate(zip(columns, offsets, strict=True)):
        for offset in own_offsets:
            q[0, head, :, : 2 * FREQUENCIES] += diagonal * waves(places - offset)
        k[0, 0, own_columns, 2 * FREQUENCIES + head] = column
        q[0, head, :, 2 * FREQUENCIES + head] = 1.0
    v = torch.randn(1, 1, n, DIM, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def context(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, plan: Plan | None = None, layer: int = 0, layers: int = 0,
    ran: list[Selection | None] | None = None,
) -> LayerContext:  # fmt: skip
    """The context of one call on bare tensors; `ran` collects what attention was run over."""
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale

    def partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
        if ran is not None:
            ran.append(selection)
        return attend(q, k, v, selection, **{"scale": factor, "return_lse": True, **options})

    def run(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Tensor:
        return partial(q, k, v, selection, **{"return_lse": False, **options}).out

    return LayerContext(
        layer=layer, layers=layers or layer + 1, layout=HeadLayout.of(q, k, v), scale=factor, attend=run, partial=partial,
        seen=k.shape[2], plan=plan,
    )  # fmt: skip


def selected(method: Prefill, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, plan: Plan | None = None) -> Selection:
    return method.select(context(q, k, v, scale, plan=plan), q, k, v)


def hits(ids: Tensor, answers: list[bytes], method: str | Prefill | None, plan: Plan | None = None) -> tuple[int, float]:
    """How many rows the pocket model answers rightly with a prefill method attached, and the density that ran."""
    longest = max(map(len, answers)) + 1
    with saccade.attach(pocket(), prefill=method, plan=plan) as handle:
        out = pocket().generate(ids, max_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=2)
        density = handle.stats().prefill_density
    texts = [bytes(max(0, token - BYTE) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    assert density is not None
    return sum(text.startswith(answer + b".") for text, answer in zip(texts, answers, strict=True)), density
