"""saccade: attention that looks only where it matters."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from saccade.autoclasses import watch

__version__ = "0.1.0"

# name -> module; resolved on first use, so that `import saccade` needs no GPU, no network and little time
_DOORS = {
    "attach": "saccade.attach",
    "attention": "saccade.attach",
    "calibrate": "saccade.attach",
    "load_cache": "saccade.attach",
    "memory": "saccade.attach",
    "mixer": "saccade.methods",
    "speculate": "saccade.attach",
    "last_run": "saccade.ops",
    "pocket": "saccade.models.pocket",
    "Plan": "saccade.core",
    "Selection": "saccade.core",
}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "Plan", "Selection", "__version__", "attach", "attention", "calibrate", "last_run", "load_cache", "memory", "mixer", "pocket",
    "speculate",
]  # fmt: skip


class _Package(ModuleType):
    """The function `saccade.attach` and the folder `saccade.attach` share a name: the attribute is always the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _DOORS and hasattr(value, name):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
    return __all__


watch()
