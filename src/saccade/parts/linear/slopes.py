"""How fast each head of a constant decay forgets: `decay = exp(-slope)` per token.

The numbers are made on the CPU even where a model is built without storage (the "meta" device), as no checkpoint holds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(heads: int) -> Tensor:
    """`2^(-8 h / H)` for h = 1 ... H, float32 `(H,)`; for an H that is no power of two, those of the next lower one and every second one of
    the next higher one."""
    lower = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / lower) for h in range(lower)]
    slopes += [2 ** (-8 * (h + 1) / (2 * lower)) for h in range(0, 2 * (heads - lower), 2)]
    return torch.tensor(slopes, device="cpu")


def lightning_slopes(heads: int, layer: int, layers: int, formula: str = "alibi") -> Tensor:
    """Slopes of lightning attention in layer `layer` of `layers`, float32 `(H,)`: lower layers forget faster.

    formula: "alibi": ALiBi slopes times `1 - l / (L - 1) + 1e-5` (the released models); "linear": `8 h / H (1 - l / L)` for h = 1 ... H
    (the paper); "none": 0. Source: lightning-attention, transnormerllm.
    """
    if formula == "alibi":
        return alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)
    if formula == "linear":
        return torch.arange(1, heads + 1, device="cpu") * (8 / heads) * (1 - layer / layers)
    if formula == "none":
        return torch.zeros(heads, device="cpu")
    raise ValueError(f"slopes {formula!r} are not known: use 'alibi', 'linear' or 'none'")


def retention_slopes(heads: int) -> Tensor:
    """`-log(1 - 2^(-5 - h))` for h = 0 ... H - 1 (RetNet, hybrid-linear-analysis), float32 `(H,)`."""
    return -torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float64, device="cpu")))).float()
