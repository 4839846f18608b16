"""Problems and options shared by the tests of attend's features."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from saccade.core import Selection

FEATURES = ("positions", "positions by query head", "sequences", "lengths", "starts", "sinks", "low rank")


def inputs(
    n_q: int = 30, n_k: int = 41, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0
) -> list[Tensor]:  # fmt: skip
    """q, k and v in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((heads, n_q), (kv_heads, n_k), (kv_heads, n_k))
    return [torch.randn(batch, h, n, dim, generator=g, dtype=torch.float64) for h, n in shapes]


def options(
    *features: str, n_q: int = 30, n_k: int = 41, batch: int = 2, heads: int = 4, kv_heads: int = 2, seed: int = 1
) -> dict[str, Any]:  # fmt: skip
    """Arguments of `attend` that switch these features on; floating-point ones in float64. "sequences" is for batch 1."""
    g = torch.Generator().manual_seed(seed)

    def places(heads: int, n: int, batch: int = batch) -> Tensor:
        return torch.randint(0, n_k + 5, (batch, heads, n), generator=g)

    made: dict[str, Any] = {}
    for feature in features:
        if feature == "positions":
            made |= {"q_positions": places(1, n_q, 1).int(), "k_positions": places(kv_heads, n_k)}
        elif feature == "positions by query head":
            made |= {"q_positions": places(kv_heads, n_q), "k_positions": places(heads, n_k, 1).int()}
        elif feature == "sequences":
            # a sequence without queries, one with more queries than keys, and rows at the end that are of none
            made["cu_seqlens_q"] = torch.tensor([0, 9, 9, 20, n_q - 2], dtype=torch.int32)
            made["cu_seqlens_k"] = torch.tensor([0, 13, 17, 22, n_k - 3], dtype=torch.int32)
        elif feature == "lengths":
            made["lengths"] = torch.tensor([n_k - 12, n_k, 0][:batch], dtype=torch.int32)
        elif feature == "starts":
            made["starts"] = torch.tensor([0, 6, 0][:batch], dtype=torch.int32)
        elif feature == "sinks":
            made["sinks"] = torch.randn(heads, generator=g, dtype=torch.float64)
        else:
            a = torch.randn(1, heads, n_q, 3, generator=g, dtype=torch.float64)
            made["low_rank_bias"] = (a, torch.randn(batch, 1, n_k, 3, generator=g, dtype=torch.float64))
    return made


def selection(
    kind: str, n_q: int = 30, n_k: int = 41, *, batch: int = 1, heads: int = 2, causal: bool = True, seed: int = 2
) -> Selection | None:  # fmt: skip
    """None for "dense"; else "tiles", "odd tiles" that no kernel takes whole, or "singles" with log weights."""
    g = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return None
    block_q, block_k = (8, 4) if kind == "odd tiles" else (16, 16)
    if kind != "singles":
        mask = torch.rand(batch, heads, math.ceil(n_q / block_q), math.ceil(n_k / block_k), generator=g) < 0.6
        return Selection.from_block_mask(mask, block_q=block_q, block_k=block_k, n_q=n_q, n_k=n_k, causal=causal)
    tokens = torch.randint(0, n_k, (batch, heads, math.ceil(n_q / 8), 9), generator=g)
    weight = torch.randn(tokens.shape, generator=g)
    return Selection.from_parts(n_q=n_q, n_k=n_k, block_q=8, tokens=tokens, log_weight=weight, causal=causal)


def leaves(
    tensors: list[Tensor], made: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """The tensors and options in `dtype` on `device`, and those of them that want gradients: q, k, v, then the options' in order."""
    moved = [x.to(device, dtype).requires_grad_() for x in tensors]
    kept: dict[str, Any] = {}
    wanted = list(moved)
    for name, value in made.items():
        if isinstance(value, tuple):
            kept[name] = tuple(x.to(device, dtype).requires_grad_() for x in value)
            wanted += kept[name]
        elif value.is_floating_point():
            kept[name] = value.to(device, dtype).requires_grad_()
            wanted.append(kept[name])
        else:
            kept[name] = value.to(device)
    return moved, kept, wanted
