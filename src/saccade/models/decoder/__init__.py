"""The hybrid decoder: one language model whose layers are a list of mixer specs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# name -> module; found on first use: transformers asks for the configuration before it has its own model classes
_HOMES = {
    "SaccadeConfig": "config", "SaccadeForCausalLM": "model", "SaccadeModel": "model", "load_cache": "saving", "save_cache": "saving",
    "schedule": "patterns",
}  # fmt: skip

__all__ = ["SaccadeConfig", "SaccadeForCausalLM", "SaccadeModel", "load_cache", "save_cache", "schedule"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
