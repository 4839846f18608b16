"""What the gallery shows: every method that selects keys, on the same few heads of the same prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import calibrate
from saccade.core import Method, format_spec
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.picture import LENGTH, picture
from saccade.methods import build, load

HEADS = 4
FIRST, LAST = 2, 8  # pooled columns at the start and before the diagonal that every method reads


def small(slug: str) -> str:
    """The spec of a method with the settings made for short sequences, which leave something out of a short prompt too."""
    return format_spec(slug, dict(load(slug).info.tiny))


def drawn(spec: str) -> bool:
    """Whether a method has something to draw: it chooses keys and does not only store them in another form."""
    method = build(spec)
    return method.info.phase in ("prefill", "decode", "cache") and not method.info.encodes and method.info.causality == "causal"


@torch.no_grad()
def maps(
    model: PreTrainedModel, ids: Sequence[int], specs: Sequence[str], tell: Callable[[str], None] = lambda text: None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """(heads by spec, reasons of failures by spec): for each spec the same HEADS heads of a result's "attention" part.

    ids: the prompt, at most its first LENGTH tokens are used. Methods with an offline part are calibrated on the prompt.
    tell: called with each spec before it runs.
    """
    ids = list(ids[:LENGTH])
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    chosen: list[tuple[int, int]] = []
    for spec in specs:
        tell(spec)
        try:
            one = _calibrated(model, contender(spec), ids)
            result = picture(model, ids, len(ids), [one], "")
        except ValueError as error:
            failed[spec] = str(error)
            continue
        if one.spec in result["failed"]:
            failed[spec] = result["failed"][one.spec]
            continue
        heads = {(layer["layer"], head["head"]): {**head, "layer": layer["layer"]} for layer in result["layers"] for head in layer["heads"]}
        chosen = chosen or _far_looking(heads)
        found[one.spec] = [heads[place] for place in chosen]
    return found, failed


def _calibrated(model: PreTrainedModel, one: Contender, ids: list[int]) -> Contender:
    device = next(model.parameters()).device
    needing: list[Method] = [method for method in one.members if "calibration" in method.info.needs]
    plans = [calibrate(model, method, [torch.tensor([ids], device=device)]) for method in needing]
    return replace(one, plans=plans)


def _far_looking(heads: dict[tuple[int, int], dict[str, Any]]) -> list[tuple[int, int]]:
    """In each of HEADS layers, evenly spread, the head with most attention between the first keys and the nearest ones."""
    layers = sorted({layer for layer, _ in heads})
    layers = [layers[round((i + 1) * (len(layers) - 1) / HEADS)] for i in range(min(HEADS, len(layers)))]

    def between(head: dict[str, Any]) -> float:
        n = int(head["size"])
        ink = torch.frombuffer(bytearray(base64.b64decode(head["map"])), dtype=torch.uint8).view(n, n).float()
        far = torch.ones(n, n, dtype=torch.bool).tril(-LAST)
        far[:, :FIRST] = False
        return float((ink * far).sum())

    best = {layer: max((place for place in heads if place[0] == layer), key=lambda place: between(heads[place])) for layer in layers}
    return [best[layer] for layer in dict.fromkeys(layers)]
