"""Marks of kernel tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def long_when_interpreted(test: Any) -> Any:
    """Many seconds in Triton's interpreter, little on a GPU: there it is a fast test, here a slow one."""
    return test if torch.cuda.is_available() else pytest.mark.slow(test)
