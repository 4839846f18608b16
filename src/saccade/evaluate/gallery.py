"""What the gallery shows: every method that selects keys or stores them in another form, on the same few heads of the same prompt."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from saccade.attach import calibrate
from saccade.core import Calibrated, Method, Plan, Rebuilding, format_spec
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.gallery_encoded import by_token, encoded
from saccade.evaluate.gallery_layers import Layer, dense_layers, left_in_model, read_in_steps, sent, sent_shares
from saccade.evaluate.lineups import CACHE, PREFILL, filled
from saccade.evaluate.picture import LENGTH, layer_part, picture
from saccade.evaluate.planning import Plans
from saccade.methods import build, load
from saccade.methods.prefill.deltallm import DeltaLLM

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
    "attention-gate": "attention-gate(threshold=0.9)",
}  # fmt: skip
# what parts are trained as, where a few steps leave too much for the picture's settings to be trained with: as the tables do, one plan
# serves every threshold
TRAINED_AS = {"attention-gate": "attention-gate"}
AIMS = ("0.25", "4/2 bits", "3 bits", "0.5")  # of the tables' lines of a cache method, the first that it has
FULL = 0.97  # above it a picture shows no choice
PLAN_LENGTH = 512  # tokens of the texts that parts are trained on here: a picture, not a result
How = Literal["replay", "steps", "model", "sent", "encoded"]


@dataclass
class Gallery:
    """heads: by spec, the same HEADS heads of a result's "attention" part, or of `gallery_encoded.encoded`. told: by spec, what was
    measured, where that is more than density and mass. failed: by spec, the reason why there is no picture."""

    heads: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def shown(slug: str) -> str:
    """The spec of a method as the quality tables have it, reading about a fifth of the pairs or a quarter of the cache; else the one with
    the settings made for short sequences, which leave something out of a short prompt too."""
    of_cache = CACHE.get(slug, {})
    own = next((of_cache[aim] for aim in AIMS if aim in of_cache), None)
    template = SHORT.get(slug) or PREFILL.get(slug, {}).get("0.2") or own
    return build(filled(template, LENGTH)).spec if template else format_spec(slug, dict(load(slug).info.tiny))


def drawn(spec: str) -> bool:
    """Whether a method has something to draw on a causal language model: it chooses keys, or stores entries in another form."""
    info = build(spec).info
    return info.phase in ("prefill", "decode", "cache") and info.causality == "causal"


def how(one: Contender) -> How:
    """How a method is drawn.

    "encoded": it stores entries in another form and reads all of them. "model": a cache policy that needs more of the model than a layer's
    queries and keys. "steps": what it reads is fetched from a form of its own, or chosen when the prompt has ended, so single steps after
    one say it. "sent": it reads every key, but not all channels anew. "replay": its selections say it.
    """
    methods = one.members
    for method in methods:
        info = method.info
        if info.phase == "cache" and (info.encodes or isinstance(method, Rebuilding) or "hidden" in info.needs):
            return "encoded" if info.encodes else "model"
        if (info.phase == "decode" and info.also) or (info.phase != "cache" and info.encodes):
            return "steps"
        if isinstance(method, DeltaLLM):
            return "sent"
    return "replay"


@torch.no_grad()
def maps(
    model: PreTrainedModel, ids: Sequence[int], specs: Sequence[str], tell: Callable[[str], None] = lambda text: None,
    plans: Sequence[Plan] = (), maker: Plans | None = None,
) -> Gallery:  # fmt: skip
    """Each spec's method on the same heads of one prompt.

    ids: the prompt, at most its first LENGTH tokens are used. Methods with an offline part that is not among `plans` are calibrated on the
    prompt. maker: makes the plans of trained parts, and of methods that store entries in another form, on other text; without it
    what is trained needs its plan. tell: called with each spec before it runs.
    """
    ids = list(ids[:LENGTH])
    plain = picture(model, ids, len(ids), [], "")
    chosen = _far_looking(_by_place(plain))
    whole = ids[: plain["length"]]  # of whole pixels
    layers: list[Layer] = []
    found = Gallery()
    for spec in specs:
        tell(spec)
        try:
            one = contender(spec)
            way = how(one)
            one = _planned(model, one, ids, plans, maker, other_text=way == "encoded")
            own = [] if maker is None else [plan for plan in one.plans if any(plan is made for made in maker.made.values())]
            made = "".join(_small(plan, one.spec) for plan in own)
            if way == "replay":
                result = picture(model, ids, len(ids), [one], "", only=chosen)
                if one.spec in result["failed"]:
                    raise ValueError(result["failed"][one.spec])
                heads, told = [_by_place(result)[place] for place in chosen], None
            else:
                layers = layers or dense_layers(model, whole)
                heads, told = _other_ways(model, one, way, whole, layers, chosen, int(plain["pool"]))
        except Exception as error:  # the others still have their pictures
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            found.failed[spec] = reason
            continue
        if way != "encoded" and min(head["density"][one.spec] for head in heads) > FULL:
            found.failed[spec] = "nothing is left out of this prompt"
            continue
        found.heads[one.spec] = heads
        if told is not None or made:
            found.told[one.spec] = (read_in_words(heads, one.spec) if told is None else told) + made
    return found


def read_in_words(heads: Sequence[dict[str, Any]], spec: str) -> str:
    """What heads read, on average."""
    density, mass = (sum(head[name][spec] for head in heads) / len(heads) for name in ("density", "mass"))
    return f"{density:.0%} of the visible pairs read, {mass:.0%} of the attention covered."


def _other_ways(
    model: PreTrainedModel, one: Contender, way: How, ids: list[int], layers: Sequence[Layer], chosen: Sequence[tuple[int, int]], pool: int
) -> tuple[list[dict[str, Any]], str | None]:
    """The heads, and what is to be said of them, of a method whose selections alone do not tell."""
    if way == "encoded":
        heads, change = encoded(layers, one, chosen, pool)
        return heads, (
            f"{change.share:.0%} of the bytes of the same entries in bfloat16; {change.moved:.1%} of the attention moved to other keys, "
            f"outputs off by {change.error:.1%}, the mean over all layers and heads."
        )
    begin, words = 0, None
    if way == "steps":
        # what serves prompts in pieces shows its choice in the prompt, the others in the steps after it
        begin = 0 if "prefill" in {method.info.phase for method in one.members} else len(ids) // 2
        masks = read_in_steps(layers, one, begin or len(ids))
        if begin:
            words = f"the first {begin} tokens are a prompt, read whole; of the steps after it:"
    elif way == "sent":
        (method,) = (method for method in one.members if isinstance(method, DeltaLLM))
        masks = {layer.ctx.layer: sent_shares(method, layer) for layer in layers}
    else:
        masks = left_in_model(model, one, ids)
    heads = []
    for layer in layers:
        own = [head for index, head in chosen if index == layer.ctx.layer]
        if own:
            mask = {one.spec: masks[layer.ctx.layer]}
            heads += [
                {**head, "layer": layer.ctx.layer} for head in layer_part(layer.ctx, layer.q, layer.k, mask, pool, own, begin)["heads"]
            ]
    if way == "sent":
        by_index = {layer.ctx.layer: sent(method, layer) for layer in layers}
        heads = [{**head, "strip": by_token(by_index[head["layer"]][head["kv_head"]].sqrt(), pool)} for head in heads]
        density = sum(head["density"][one.spec] for head in heads) / len(heads)
        return heads, (
            "every pair is read, recent keys whole and older ones as changes against the key before. The darker the strip above, the more "
            "of a key's channels are sent anew; the others stand as they were sent before. "
            f"{density:.0%} of the products are left."
        )
    return heads, None if words is None else f"{words} {read_in_words(heads, one.spec)}"


def _by_place(result: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(layer["layer"], head["head"]): {**head, "layer": layer["layer"]} for layer in result["layers"] for head in layer["heads"]}


def _small(plan: Plan, spec: str) -> str:
    """How little a plan that was made for a picture of `spec` has seen."""
    if "steps" in plan.notes:
        named = f" as `{plan.spec}`" if plan.slug in TRAINED_AS and plan.spec != spec else ""
        return f" Trained for this picture{named}: {plan.notes['steps']} steps on texts of about {PLAN_LENGTH} tokens."
    return f" Calibrated for this picture on {plan.notes['tokens']} tokens of other text."


def _planned(
    model: PreTrainedModel, one: Contender, ids: list[int], plans: Sequence[Plan], maker: Plans | None, *, other_text: bool
) -> Contender:
    """The contender with its plans: those given, else made. other_text: not on the prompt that is drawn, if there is a maker."""
    device, given = next(model.parameters()).device, {plan.slug: plan for plan in plans}
    own = [given[method.info.slug] for method in one.members if method.info.slug in given]
    needing: list[Method] = [m for m in one.members if "calibration" in m.info.needs and m.info.slug not in given]
    for method in needing:
        trained = not isinstance(method, Calibrated)
        if maker is not None and (trained or other_text):
            with torch.enable_grad():
                of = contender(TRAINED_AS.get(method.info.slug, method.spec))
                own += [plan for plan in maker.of(of, PLAN_LENGTH if trained else LENGTH) if plan.slug == method.info.slug]
        elif isinstance(method, Calibrated):
            own.append(calibrate(model, method, [torch.tensor([ids], device=device)]))
        else:
            raise ValueError(f"{method.info.slug} has a part that is trained: give its plan")
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
