"""A small vision transformer whose layers are a list of mixer specs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> module; found on first use, as in `saccade.models.decoder`
_HOMES = {"SaccadeViTConfig": "config", "SaccadeViTForImageClassification": "model", "SaccadeViTModel": "model", "image_mixer": "mixers"}

__all__ = ["SaccadeViTConfig", "SaccadeViTForImageClassification", "SaccadeViTModel", "image_mixer"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
