"""calibrate: the offline part of methods that have one, in one go or resumed sample by sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.attach.gradients import measure_gradients
from saccade.core import Calibrated, LayerContext, Method, Plan, fingerprint
from saccade.core.files import atomic_write, check_writable
from saccade.methods import build
from saccade.parts.static.gradient import GradientCalibrated

SCHEMA = "saccade.partial/1"


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    method: str | Method,
    token_batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
    partial: str | Path | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Plan:
    """Measure `method` on token batches `(B, N)` int64 (no padding) and conclude a Plan for this model.

    progress is called with the number of batches done. partial: a .safetensors file that holds the statistics so far; it is written
    after every batch, and a call that finds it there goes on after the batches it has seen, to the same plan bit for bit. It is left
    in place: remove it once the plan is saved. arguments: JSON-able facts that are kept in it and must be the same when it is resumed.

    ValueError when the method has no offline part, when no batch was given, and when the partial file was made by another method, for
    another model, with other arguments or from other tokens.
    """
    chosen = build(method)
    if not isinstance(chosen, Calibrated):
        raise ValueError(f"{chosen.info.slug} has no offline part: use it without a plan")
    owner = {
        "method": chosen.spec, "model": fingerprint(model), "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **(arguments or {}),
    }  # fmt: skip
    found = _Sums()
    if partial is not None and check_writable(partial).exists():
        found = _Sums.load(partial, owner)
        if progress is not None:
            progress(found.done)

    def measure(ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        add(ctx.layer, chosen.measure(ctx, q, k, v))

    def add(layer: int, statistics: dict[str, Tensor]) -> None:
        # a resumed run has its sums on the CPU
        sums = {name: x.to(statistics[name].device) if name in statistics else x for name, x in found.layers.get(layer, {}).items()}
        found.layers[layer] = chosen.combine(sums, statistics)

    device, resumed, seen, special = next(model.parameters()).device, found.done, 0, _special_ids(model)
    by_gradient = isinstance(chosen, GradientCalibrated)
    with nullcontext() if by_gradient else reading_session(model, measure):
        for batch in token_batches:
            if batch.ndim != 2 or batch.shape[1] < 2:
                raise ValueError(f"a calibration batch has shape {tuple(batch.shape)}: expected (B, N) token ids with N >= 2")
            seen += 1
            if seen <= resumed:
                found.check(batch, last=seen == resumed, path=partial)
                continue
            if by_gradient:
                measure_gradients(model, chosen, batch.to(device), add)
            else:
                model(input_ids=_checked_length(model, chosen, chosen.sample_ids(batch, special)).to(device), use_cache=False)
            found.add(batch)
            if partial is not None:
                found.save(partial, owner)
            if progress is not None:
                progress(found.done)
    if not found.done:
        raise ValueError("calibrate was given no token batches: give at least one")
    if seen < resumed:
        raise ValueError(f"{partial} has seen {resumed} batches, only {seen} were given: use the same arguments or remove the file")
    layers = dict(sorted(found.layers.items()))
    concluded = chosen.conclude_all(layers)
    tensors = {f"layer.{layer}.{name}": value for layer, tensors in concluded.items() for name, value in tensors.items()}
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    return Plan(
        slug=chosen.info.slug, spec=chosen.spec, fingerprint=owner["model"], tensors=tensors,
        notes={"batches": found.done, "tokens": found.tokens, "model": type(model).__name__ if "/" in name else name},
    )  # fmt: skip


def _special_ids(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the model's special tokens, as its configuration names them."""
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")]
    return frozenset(i for given in named for i in (given if isinstance(given, list | tuple) else [given]) if isinstance(i, int))


def _checked_length(model: PreTrainedModel, method: Method, ids: Tensor) -> Tensor:
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise ValueError(f"{method.spec} probes the model with {ids.shape[1]} tokens, it takes {longest}: make the probe shorter")
    return ids


@dataclass
class _Sums:
    """Statistics of the batches so far, by layer and name; digest: of the tokens they came from, in order."""

    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    done: int = 0
    tokens: int = 0
    digest: str = ""
    _checked: str = ""

    def add(self, batch: Tensor) -> None:
        self.done, self.tokens, self.digest = self.done + 1, self.tokens + batch.numel(), _chained(self.digest, batch)

    def check(self, batch: Tensor, *, last: bool, path: str | Path | None) -> None:
        """A batch that is skipped because it was measured already. ValueError, at the last of them, if the tokens were others."""
        self._checked = _chained(self._checked, batch)
        if last and self._checked != self.digest:
            raise ValueError(f"{path} was made from another text: use the same text or remove the file")

    def save(self, path: str | Path, owner: Mapping[str, Any]) -> None:
        facts = {"schema": SCHEMA, "owner": dict(owner), "done": self.done, "tokens": self.tokens, "digest": self.digest}
        tensors = {
            f"{layer}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for layer, sums in self.layers.items() for name, value in sums.items()
        }  # fmt: skip
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"partial": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path, owner: Mapping[str, Any]) -> _Sums:
        """What an interrupted run left. ValueError when it was another run, or when the file is none of ours."""
        layers: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {}).get("partial", "{}"))
                if facts.get("schema") != SCHEMA:
                    raise ValueError("another kind of file")
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    layer, _, name = key.partition(".")
                    layers.setdefault(int(layer), {})[name] = file.get_tensor(key)
                before = json.loads(json.dumps(facts["owner"]))
                found = cls(layers, int(facts["done"]), int(facts["tokens"]), str(facts["digest"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} does not hold an interrupted calibration of this version: remove it") from None
        now = json.loads(json.dumps(owner))
        differ = [
            "another model" if name == "model" else f"{name} {before.get(name)!r} (now {now.get(name)!r})"
            for name in dict.fromkeys((*now, *before)) if now.get(name) != before.get(name)
        ]  # fmt: skip
        if differ:
            raise ValueError(f"{path} is of an interrupted run with {', '.join(differ)}: use the same arguments to go on, or remove it")
        return found


def _chained(digest: str, batch: Tensor) -> str:
    """A hash of the tokens so far and these."""
    text = f"{digest}{tuple(batch.shape)}{batch.flatten().tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()
