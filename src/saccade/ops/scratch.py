"""Buffers that outlive a call.

On a CPU, large temporaries come as fresh pages from the system and go back to it at once; a page fault every 4 KB
can cost several times the copy that the memory is for. A thread therefore keeps one buffer for each purpose. On
other devices torch itself keeps memory.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

LIMIT = 32 << 20  # bytes of the largest buffer that is kept


class _Held(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}


_held = _Held()


def scratch(purpose: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor, the caller's until this thread next asks for the same purpose and dtype."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    n = math.prod(shape)
    buffer = _held.buffers.get((purpose, dtype))
    if buffer is None or buffer.numel() < n:
        with torch.inference_mode(False):  # a tensor made in inference mode can't be written outside of it
            buffer = torch.empty(n, dtype=dtype)
        if n * buffer.element_size() <= LIMIT:
            _held.buffers[purpose, dtype] = buffer
    return buffer[:n].view(shape)


def as_exact(x: Tensor, exact: torch.dtype, purpose: str) -> Tensor:
    """`x` in dtype `exact`: itself, or a copy in the scratch buffer of this purpose."""
    return x if x.dtype == exact else scratch(purpose, tuple(x.shape), exact, x.device).copy_(x)
