"""Makes `AutoConfig` and transformers' other auto classes know saccade's models, without importing transformers before its user does.

`watch` registers at once what can be; else it leaves a finder on `sys.meta_path` that waits for transformers' own modules and looks for
nothing else. The models are made of `PreTrainedModel`, whose module may import that of the auto classes, so they are registered when
neither is half imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"
_BASE = "transformers.modeling_utils"
# home, config, and for each auto class the model; the last one is the last to be defined in its module
_FAMILIES = (
    ("saccade.models.decoder", "SaccadeConfig", (("AutoModel", "SaccadeModel"), ("AutoModelForCausalLM", "SaccadeForCausalLM"))),
    (
        "saccade.models.vit", "SaccadeViTConfig",
        (("AutoModel", "SaccadeViTModel"), ("AutoModelForImageClassification", "SaccadeViTForImageClassification")),
    ),
)  # fmt: skip


def watch() -> None:
    """Register now, or as soon as transformers' auto classes are imported."""
    register()
    if not all(_has(f"{home}.model", pairs[-1][1]) for home, _, pairs in _FAMILIES):
        sys.meta_path.insert(0, _Finder())


def _has(name: str, attribute: str) -> bool:
    """Whether a module has run, as far as one of its classes."""
    return hasattr(sys.modules.get(name), attribute)


def register() -> None:
    """Whatever can be registered by now."""
    if _has(_CONFIGS, "AutoConfig"):
        for home, config, _ in _FAMILIES:
            found = getattr(import_module(f"{home}.config"), config)
            sys.modules[_CONFIGS].AutoConfig.register(found.model_type, found, exist_ok=True)
    # what is being imported registers at its end
    ends = [(_BASE, "PreTrainedModel"), *((f"{home}.model", pairs[-1][1]) for home, _, pairs in _FAMILIES)]
    half_way = any(name in sys.modules and not _has(name, last) for name, last in ends)
    if _has(_MODELS, "AutoModelForImageClassification") and not half_way:
        for home, config, pairs in _FAMILIES:
            models, key = import_module(f"{home}.model"), getattr(import_module(f"{home}.config"), config)
            for auto, model in pairs:
                getattr(sys.modules[_MODELS], auto).register(key, getattr(models, model), exist_ok=True)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.searching: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in (_CONFIGS, _MODELS, _BASE) or fullname in self.searching:
            return None
        self.searching.add(fullname)
        try:
            spec = find_spec(fullname)
        finally:
            self.searching.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs a module as its own loader does, then registers."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)
