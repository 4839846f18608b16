"""Every head's attention on one prompt, what a prefill method reads of it, and what each head is for: schema "saccade.inspect/1".

One dense run gives each layer's queries, keys and values; from them come a map pooled to at most a few hundred pixels, the share of
each of its cells that the method reads, the attention mass on that, and the scores of `head_scores`. Nothing of the size of the prompt
squared is held. The file is described in docs/inspect-schema.md.
"""

from __future__ import annotations

import inspect as signatures
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.capture import reading_session
from saccade.core import LayerContext, Plan, Selection
from saccade.evaluate import head_scores, kept, maps
from saccade.evaluate import result as results
from saccade.evaluate.contenders import Contender, contender
from saccade.evaluate.prompts import Codec, prompt_of
from saccade.evaluate.replay import LayerReplay
from saccade.evaluate.tasks import build
from saccade.evaluate.text import grammar

SCHEMA = "saccade.inspect/1"
WIDEST = 256  # pixels of a map
MANY_HEADS = 256  # a model with more heads gets maps of at most half that, so that its page still opens
SHORTEST = 8
Progress = Callable[[float, str], None]


def check_prefill(spec: str, plans: Sequence[Plan] = ()) -> Contender:
    """The prefill method of a spec. Raises ValueError when it is of another kind, or needs a plan that is not among `plans`."""
    found = contender(spec)
    others = [method.info.phase for method in found.methods.values() if method.info.phase != "prefill"]
    if others:
        raise ValueError(f"{spec} has a {others[0]} method: only what a prefill method reads can be inspected")
    given = {plan.slug for plan in plans}
    for method in found.members:
        if "calibration" in method.info.needs and method.info.slug not in given:
            raise ValueError(f"{method.info.slug} needs a calibration plan: run `saccade calibrate {method.info.slug} -o plan` and pass it")
    return Contender(found.spec, found.slug, found.methods, list(plans))


def needle_prompt(tokenizer: Any, length: int) -> list[int]:
    """`length` token ids (or the nearest fewer) of the shipped text with one fact in the middle and its question at the end."""
    prompt = prompt_of(build("needle(depths=(0.5,))"), Codec(tokenizer), grammar(), length=length, seed=0, index=0)
    return [*prompt.context, *prompt.question]


def tile_for(length: int, heads: int) -> int:
    """Tokens to a pixel, a power of two: maps are 129 to 256 pixels wide (half that beyond MANY_HEADS heads), or one pixel a token."""
    widest = WIDEST if heads <= MANY_HEADS else WIDEST // 2
    tile = 1
    while -(-length // tile) > widest:
        tile *= 2
    return tile


@torch.no_grad()
def inspect(
    model: PreTrainedModel, tokenizer: Any, ids: Sequence[int], *, prefill: str | None = None, plans: Sequence[Plan] = (),
    name: str = "model", source: str = "tokens", command: str = "", progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The result for the prompt `ids`, a document of schema "saccade.inspect/1".

    prefill: a method's spec; None or "dense" gives maps and scores only. plans: for methods that need one. name, source, command: what
    the file says of the model, the prompt and how it was made. progress is called with the share done, in [0, 1], and what is being done.
    Raises ValueError for a prompt below SHORTEST tokens or beyond the model's positions, and whatever the method raises.
    """
    chosen = check_prefill("dense" if prefill is None else prefill, plans)
    for plan in plans:
        plan.check_model(model)
    config = model.config.get_text_config(decoder=True)
    longest = getattr(config, "max_position_embeddings", None)
    if len(ids) < SHORTEST:
        raise ValueError(f"the prompt has {len(ids)} tokens: give one of at least {SHORTEST}")
    if longest is not None and len(ids) > longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model {longest} positions: give at most {longest}")
    about = results.describe_model(model, name)
    pairs = head_scores.repeats(ids)
    run = _Run(chosen, len(ids), tile_for(len(ids), about["layers"] * about["query_heads"]), pairs, progress or (lambda share, doing: None))
    inputs = {"input_ids": torch.tensor([list(ids)], device=next(model.parameters()).device), "use_cache": False}
    if "logits_to_keep" in signatures.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # the logits of a long prompt would be larger than all of its attention
    with reading_session(model, lambda *_: None, dense=run.layer) as session:
        run.total = len(session.managed)
        model(**inputs)
    codec = Codec(tokenizer)
    texts = [codec.decode(list(ids[at : at + run.tile])).decode("utf-8", errors="replace") for at in range(0, len(ids), run.tile)]
    notes = [] if run.total == about["layers"] else [f"{about['layers'] - run.total} layers have no full attention and are left out."]
    return {
        "schema": SCHEMA, "created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command,
        "environment": results.environment(model), "model": about,
        "settings": {
            "prompt": source, "length": len(ids), "prefill": None if chosen.dense else chosen.spec, "tile": run.tile,
            "sinks": head_scores.SINKS, "ngram": head_scores.NGRAM, "repeats": int(pairs[0].numel()),
            "rows": min(kept.SAMPLED_ROWS, len(ids)),
        },
        "attention": {
            "prompt": "".join(texts)[:200], "length": len(ids), "pool": run.tile, "texts": [text[:80] for text in texts],
            "layers": run.layers,
        },
        "notes": notes,
    }  # fmt: skip


class _Run:
    """What is gathered layer by layer while the model runs."""

    def __init__(self, chosen: Contender, length: int, tile: int, pairs: tuple[Tensor, Tensor], progress: Progress) -> None:
        self.chosen, self.length, self.tile, self.pairs, self.progress = chosen, length, tile, pairs, progress
        self.layers: list[dict[str, Any]] = []
        self.total = 1
        self._shared: dict[int, dict[Any, Any]] = {}

    def layer(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Look at a layer's attention; its output."""
        done = len(self.layers)

        def tell(share: float, what: str) -> None:
            self.progress((done + share) / self.total, f"layer {done + 1} of {self.total}{what}")

        tell(0.0, f", {self.chosen.spec}" if not self.chosen.dense else "")
        selection, measured = self._selected(ctx, q, k, v)
        fine = None if selection is None else kept.whole_tiles(selection, self.tile, q.shape[1])
        rows, columns = fine or (self.tile, self.tile)
        options: dict[str, Any] = {"scale": ctx.scale, "softcap": ctx.softcap}
        sums, lse, out = self._whole(ctx, q, k, v, rows, columns, lambda share: tell(share, ""))
        covered = None
        if selection is not None and fine is not None:
            covered = kept.mass_of_tiles(selection, sums, rows, columns)
        elif selection is not None:
            covered = kept.mass_of_rows(selection, q, k, kept.sampled_rows(self.length, kept.SAMPLED_ROWS, seed=ctx.layer), **options)
        sinks = head_scores.sink_scores(q, k, lse, **options)
        found = head_scores.retrieval_scores(q, k, lse, self.pairs, **options)
        mass = kept.mean_mass(maps.pool_sums(sums, self.tile // rows, self.tile // columns), self.length, self.tile)
        shares = density = None
        if selection is not None:
            shares, density = kept.kept_shares(selection, self.tile), selection.density_by_head()[0]
        heads = []
        for head in range(q.shape[1]):
            spec = self.chosen.spec
            entry = {
                "head": head, "kv_head": head * k.shape[1] // q.shape[1], "size": mass.shape[-1],
                "map": maps.as_bytes(maps.log_scaled(mass[head])), "sink": float(sinks[head]),
                "retrieval": None if found is None else float(found[head]), "selections": {}, "mass": {}, "density": {},
            }  # fmt: skip
            if shares is not None and density is not None and covered is not None:
                of = head * shares.shape[0] // q.shape[1]
                entry["selections"] = {spec: maps.as_bytes(shares[of])}
                entry["mass"] = {spec: float(covered[head])}
                entry["density"] = {spec: float(density[of])}
            heads.append(entry)
        mass_from = None if selection is None else "tiles" if fine is not None else "rows"
        self.layers.append({"layer": ctx.layer, "density": measured, "mass_from": mass_from, "heads": heads})
        tell(1.0, "")
        return out

    def _whole(
        self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor, rows: int, columns: int, progress: Callable[[float], None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over tiles, log-sum-exp and output. On a CPU one pass over the scores gives all three."""
        options: dict[str, Any] = {"scale": ctx.scale, "softcap": ctx.softcap, "progress": progress}
        if q.is_cuda:
            return *maps.tile_sums(q, k, rows, columns, **options), ctx.attend(q, k, v, None)
        sums, lse, out = maps.whole(q, k, v, rows, columns, **options)
        assert out is not None
        return sums, lse, out

    def _selected(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> tuple[Selection | None, float | None]:
        """What the method selects, by token, and the density of what it computes when it runs (repairs and probes included)."""
        if self.chosen.dense:
            return None, None
        replay = LayerReplay(ctx, q, k, v, self.chosen, self._shared)
        replay.feed(0, self.length)
        selection = replay.chosen(self.length)
        # a layer that the method reads whole is drawn as such
        whole = Selection.full(self.length, self.length, device=q.device) if selection is None else selection
        return whole, replay.runner.stats.prefill.density


def save(result: dict[str, Any], path: str | Path) -> None:
    """Write the file at once or not at all."""
    results.save(result, path)
