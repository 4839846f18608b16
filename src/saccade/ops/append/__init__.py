"""New keys and values written behind those that are there, in one kernel on a GPU: three copies a layer and token cost more to launch
than to do."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.gpu import require_triton, runs_on

FEW = 64  # rows of a head that are taken in one kernel; more are copied as fast by torch


def append_rows(rooms: list[Tensor], new: list[Tensor], at: int, places: Tensor | None = None, first: int = 0, impl: str = "auto") -> None:
    """Write new[i] `(B, H, m, D_i)` to rooms[i] `(B, H, room, D_i)` from entry `at` on, in place; two of them, such as keys and values.

    places: int32 `(B, H, room)` that takes the numbers first, first + 1, ... beside them.
    rooms and places are contiguous. impl: "auto", "torch" or "triton". Raises ValueError where the rows do not fit.
    """
    m = new[0].shape[2]
    for room, x in zip(rooms, new, strict=True):
        if x.shape != (*room.shape[:2], m, room.shape[3]) or at + m > room.shape[2]:
            raise ValueError(f"append_rows: rows {tuple(x.shape)} do not fit {tuple(room.shape)} from entry {at} on")
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl {impl!r} is not one of auto, torch, triton")
    if impl == "triton":
        require_triton("append_rows", rooms[0])
    if impl == "triton" or (impl == "auto" and quick(rooms[0], new)):
        from saccade.ops.append.triton import append_rows as fused

        fused(rooms, new, at, places, first)
        return
    for room, x in zip(rooms, new, strict=True):
        room[:, :, at : at + m] = x
    if places is not None:
        places[:, :, at : at + m] = torch.arange(first, first + m, dtype=places.dtype, device=places.device)


def quick(room: Tensor, new: list[Tensor]) -> bool:
    """Whether "auto" takes the kernel: few rows on a GPU, without gradients, and nothing traced."""
    if not runs_on(room) or new[0].shape[2] > FEW or torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in new))
