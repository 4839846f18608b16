"""Plan: what a calibration found, bound to the model it was made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from saccade.core.files import atomic_write

SCHEMA = "saccade.plan/1"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tensors per layer, plus which method (`slug`, `spec`) and which model (`fingerprint`) they belong to.

    tensors: keys `layer.{index}.{name}`. notes: JSON-able facts about the calibration (samples, tokens, seed).
    """

    slug: str
    spec: str
    fingerprint: str
    tensors: dict[str, Tensor]
    notes: dict[str, Any]

    def tensor(self, layer: int, name: str) -> Tensor:
        """Calibrated tensor `name` of a layer; ValueError when the plan has none."""
        key = f"layer.{layer}.{name}"
        if key not in self.tensors:
            raise ValueError(f"this {self.slug} plan has no {name!r} for layer {layer}: calibrate again with this version")
        return self.tensors[key]

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file whose header carries the JSON facts."""
        facts = {"schema": SCHEMA, "slug": self.slug, "spec": self.spec, "fingerprint": self.fingerprint, "notes": self.notes}
        with atomic_write(path) as temporary:
            # copies, because safetensors refuses entries that share storage
            own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in self.tensors.items()}
            save_file(own, temporary, metadata={"plan": json.dumps(facts)})
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; ValueError in one sentence when the file is missing or is no plan."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no plan at {path}: make one with `saccade calibrate METHOD --model M -o {path}`")
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("plan", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ValueError(f"{path} is not a saccade plan: {error}") from None
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a saccade plan of version {SCHEMA!r}: calibrate again")
        kinds = {"slug": str, "spec": str, "fingerprint": str, "notes": dict}
        for name, kind in kinds.items():
            if not isinstance(facts.get(name), kind):
                raise ValueError(f"{path} is not a saccade plan: its header has no proper {name!r}, so calibrate again")
        return cls(tensors=tensors, **{name: facts[name] for name in kinds})

    def check_model(self, model: nn.Module) -> None:
        """ValueError when the plan was made for another model."""
        if self.fingerprint != fingerprint(model):
            raise ValueError(
                f"this {self.slug} plan was made for another model ({self.notes.get('model', 'unnamed')}): "
                "calibrate again with the model it should serve"
            )


def fingerprint(model: nn.Module) -> str:
    """A hash of parameter names, shapes and a few values (rounded to bfloat16, so that a cast copy is the same model)."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 8)][:8]
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
