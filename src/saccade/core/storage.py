"""Objects of tensors and plain values as JSON and safetensors: nothing is pickled, nothing in a file is ever run."""

from __future__ import annotations

import hashlib
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from saccade.core.files import atomic_write

_HOME = "saccade."  # objects of other packages are neither written nor made
_PLAIN = (str, bool, int, type(None))


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree for `value`; its tensors join `tensors` under new names, those that are the same view of one storage once.

    Plain values, lists, tuples, dicts, sets of plain values, torch dtypes and devices, and objects of saccade's own classes: their
    attributes, or what their `stored_fields()` returns instead. Raises ValueError for anything else.
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        return {"tensor": _name(value, tensors)}
    if isinstance(value, torch.dtype | torch.device):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    kind = type(value)
    if kind in (list, tuple, set, frozenset):
        items = sorted(value) if kind in (set, frozenset) else value
        return {kind.__name__: [pack(item, tensors) for item in items]}
    if kind is dict:
        return {"dict": [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]}
    if not kind.__module__.startswith(_HOME) or (not hasattr(value, "__dict__") and not isinstance(value, tuple)):
        raise ValueError(f"a {kind.__module__}.{kind.__qualname__} can't be saved: only tensors, plain values and saccade's own objects")
    tree: dict[str, Any] = {"class": f"{kind.__module__}:{kind.__qualname__}"}
    if isinstance(value, tuple):
        tree["items"] = [pack(item, tensors) for item in value]
    else:
        tree["fields"] = {name: pack(item, tensors) for name, item in _fields(value).items()}
    if isinstance(value, dict):
        tree["entries"] = [[pack(key, tensors), pack(item, tensors)] for key, item in value.items()]
    return tree


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `pack` was given; ValueError for a tree it can't have made."""
    if isinstance(tree, (*_PLAIN, float)):
        return tree
    if not isinstance(tree, dict):
        raise ValueError(f"unexpected {type(tree).__name__} in the stored tree")
    if "class" in tree:
        return _object(tree, tensors)
    (kind, content), *more = tree.items()
    if more:
        raise ValueError(f"unexpected entries {', '.join(tree)} in the stored tree")
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "dtype":
        found = getattr(torch, content, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{content!r} is not a dtype")
        return found
    if kind == "device":
        return torch.device(content)
    if kind == "dict":
        return {unpack(key, tensors): unpack(item, tensors) for key, item in content}
    made = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}.get(kind)
    if made is None:
        raise ValueError(f"unexpected {kind!r} in the stored tree")
    return made(unpack(item, tensors) for item in content)


def write(path: str | Path, schema: str, facts: dict[str, Any], value: Any) -> Path:
    """Write `value` as one safetensors file whose header carries the tree, the facts and a checksum."""
    tensors: dict[str, Tensor] = {}
    tree = pack(value, tensors)
    held = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    head = json.dumps({"schema": schema, "facts": facts, "tree": tree})
    metadata = {"saccade": head, "checksum": _checksum(head, held)}
    # safetensors wants at least one tensor
    with atomic_write(path) as temporary:
        save_file(held or {"empty": torch.zeros(1)}, temporary, metadata=metadata)
    return Path(path)


def read(path: str | Path, schema: str, device: torch.device | str = "cpu") -> tuple[dict[str, Any], Any]:
    """`(facts, value)` of a file that `write` made; ValueError in one sentence for a missing, foreign or damaged one."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        head = metadata.get("saccade", "{}")
        document = json.loads(head)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise ValueError(f"{path} is not a file of kind {schema!r}")
    if metadata.get("checksum") != _checksum(head, {name: x for name, x in tensors.items() if name != "empty"}):
        raise ValueError(f"{path} is damaged: its contents don't match its checksum")
    placed = {name: x.to(device) for name, x in tensors.items()}
    try:
        return document["facts"], unpack(document["tree"], placed)
    except (KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{path} was written by another version of saccade: {error}") from None


def _name(x: Tensor, tensors: dict[str, Tensor]) -> str:
    key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
    for name, other in tensors.items():
        if x.numel() and key == (other.data_ptr(), tuple(other.shape), other.stride(), other.dtype):
            return name
    name = f"t{len(tensors)}"
    tensors[name] = x
    return name


def _fields(value: Any) -> dict[str, Any]:
    return value.stored_fields() if hasattr(value, "stored_fields") else vars(value)


def _object(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    module, _, name = tree["class"].partition(":")
    if not module.startswith(_HOME) or not name.isidentifier():
        raise ValueError(f"{tree['class']!r} is none of saccade's classes")
    kind = getattr(import_module(module), name)
    if not isinstance(kind, type) or kind.__module__ != module:
        raise ValueError(f"{tree['class']!r} is none of saccade's classes")
    if "items" in tree:
        return kind(*(unpack(item, tensors) for item in tree["items"]))
    made: Any = object.__new__(kind) if not issubclass(kind, dict) else kind()
    # frozen dataclasses too
    made.__dict__.update({name: unpack(item, tensors) for name, item in tree["fields"].items()})
    if "entries" in tree:
        made.update({unpack(key, tensors): unpack(item, tensors) for key, item in tree["entries"]})
    return made


def _checksum(head: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(head.encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()
