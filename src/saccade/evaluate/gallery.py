"""What the gallery shows: every method that selects keys, on the same few heads of the same prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from saccade.attach import calibrate
from saccade.core import Calibrated, Method, Plan, format_spec
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.lineups import CACHE, PREFILL, filled
from saccade.evaluate.picture import LENGTH, picture
from saccade.methods import build, load

HEADS = 4
FIRST, LAST = 2, 8  # pooled columns at the start and before the diagonal that every method reads


# where the tables' settings read all of so short a prompt
SHORT = {
    "random": "random(budget=0.25)", "random-tiles": "random-tiles(density=0.2)",
    "l2-norm": "l2-norm(budget=0.25, skip_layers=(), prune_after=256)",
    "anchorattention": "anchorattention(theta=2.0, block=32, step=2, tail=64)",
    "moa": "moa(bound=0.3, block=16, alpha_step=32, alpha_max=512)",
    "sale": "sale(tau=1.0, local=16, segment=16, sinks=8, block_q=16, block_k=8, dense_below=0)",
    "hylra": "hylra(budget=0.25, block=16, theta=0.0, max_error=1e9, max_divergence=1e9)",
}  # fmt: skip
FULL = 0.97  # above it a picture shows no choice


def shown(slug: str) -> str:
    """The spec of a method as the quality tables have it, reading about a fifth of the pairs or a quarter of the cache; else the one with
    the settings made for short sequences, which leave something out of a short prompt too."""
    template = SHORT.get(slug) or PREFILL.get(slug, {}).get("0.2") or CACHE.get(slug, {}).get("0.25")
    return build(filled(template, LENGTH)).spec if template else format_spec(slug, dict(load(slug).info.tiny))


def drawn(spec: str) -> bool:
    """Whether a method has something to draw: it chooses keys and does not only store them in another form."""
    method = build(spec)
    return method.info.phase in ("prefill", "decode", "cache") and not method.info.encodes and method.info.causality == "causal"


@torch.no_grad()
def maps(
    model: PreTrainedModel, ids: Sequence[int], specs: Sequence[str], tell: Callable[[str], None] = lambda text: None,
    plans: Sequence[Plan] = (),
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:  # fmt: skip
    """(heads by spec, reasons by spec that has no picture): for each spec the same HEADS heads of a result's "attention" part.

    ids: the prompt, at most its first LENGTH tokens are used. Methods with an offline part that is not among `plans` are calibrated on the
    prompt; what is trained needs its plan. tell: called with each spec before it runs.
    """
    ids = list(ids[:LENGTH])
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    chosen: list[tuple[int, int]] = []
    for spec in specs:
        tell(spec)
        try:
            one = _calibrated(model, contender(spec), ids, plans)
            result = picture(model, ids, len(ids), [one], "", only=chosen or None)
        except ValueError as error:
            failed[spec] = str(error)
            continue
        if one.spec in result["failed"]:
            failed[spec] = result["failed"][one.spec]
            continue
        heads = {(layer["layer"], head["head"]): {**head, "layer": layer["layer"]} for layer in result["layers"] for head in layer["heads"]}
        chosen = chosen or _far_looking(heads)
        own = [heads[place] for place in chosen]
        if min(head["density"][one.spec] for head in own) > FULL:
            failed[spec] = "nothing is left out of this prompt"
            continue
        found[one.spec] = own
    return found, failed


def _calibrated(model: PreTrainedModel, one: Contender, ids: list[int], plans: Sequence[Plan]) -> Contender:
    device, given = next(model.parameters()).device, {plan.slug: plan for plan in plans}
    own = [given[method.info.slug] for method in one.members if method.info.slug in given]
    needing: list[Method] = [m for m in one.members if "calibration" in m.info.needs and m.info.slug not in given]
    for method in needing:
        if not isinstance(method, Calibrated):
            raise ValueError(f"{method.info.slug} has a part that is trained: give its plan")
        own.append(calibrate(model, method, [torch.tensor([ids], device=device)]))
    return replace(one, plans=own)


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
