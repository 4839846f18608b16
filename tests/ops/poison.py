"""Memory that a kernel forgets to write, or reads before it is written, shows as NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the length of a test `torch.empty` and `torch.empty_like` give floating-point tensors full of NaN."""
    empty = torch.empty

    def full_of_nan(*size: Any, **options: Any) -> Tensor:
        x = empty(*size, **options)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    def like(x: Tensor, **options: Any) -> Tensor:
        return full_of_nan(x.shape, **{"dtype": x.dtype, "device": x.device, **options})

    monkeypatch.setattr(torch, "empty", full_of_nan)
    monkeypatch.setattr(torch, "empty_like", like)
