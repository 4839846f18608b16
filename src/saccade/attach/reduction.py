"""Running a model on a part of its prompt that one of its own layers has chosen.

The forward pre-hook of the session runs the model up to the layer that chooses (no cache, no logits; a private exception ends the run
there) and hands the model the chosen tokens instead of the prompt, at positions 0 ... k - 1. The cache counts all n tokens as seen and
keeps the places of the chosen ones, so `generate` goes on as after any prompt; positions of later tokens continue from k.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.layercall import LayerCall
from saccade.attach.layers import LayerRunner
from saccade.attach.models import managed_layers, text_config
from saccade.cache import KVLayer
from saccade.core import PromptReduction

DROPPED = "reduced prompt"  # in the sequence's state: int64 (B, 2), tokens left out, and where the prompt ended


class Reached(Exception):
    """Carries the call of the layer that chooses out of the model."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__("the choosing layer has its queries and keys")
        self.call = call


@dataclass(frozen=True)
class Chosen:
    """One shortened prompt. places: of each row the chosen tokens, int64 ascending, as they lie in the input of n tokens, padding
    counted. real: tokens of each row that are not padding. wanted: newest tokens whose logits are asked for. scatter: whether the
    caller expects logits of all n tokens."""

    places: list[Tensor]
    real: list[int]
    n: int
    wanted: int
    scatter: bool

    @property
    def longest(self) -> int:
        return max(len(row) for row in self.places)


@dataclass
class Reducer:
    """The reduction of an attached model. chosen: of the last prompt that was shortened."""

    model: PreTrainedModel
    method: PromptReduction
    layer: int = field(init=False)
    running: bool = False
    chosen: Chosen | None = None
    _fresh: bool = False

    def __post_init__(self) -> None:
        slug, layers = self.method.info.slug, int(text_config(self.model).num_hidden_layers)
        if len(managed_layers(self.model)) != layers:
            raise ValueError(
                f"{slug} runs the model on fewer tokens than its cache counts, which only full-attention layers can tell apart: "
                "use a model of full-attention layers"
            )
        self.layer = self.method.layer(layers)
        if not 0 <= self.layer < layers:
            raise ValueError(f"{slug} is to choose at layer {self.layer}, {type(self.model).__name__} has {layers}: give a lower one")

    def reaches(self, index: int) -> bool:
        """Whether this attention call ends the first pass."""
        return self.running and index == self.layer

    # -- before a forward pass ---------------------------------------------------------------------------------------------

    def shorten(self, kwargs: dict[str, Any], real: Tensor | None, first: LayerRunner) -> dict[str, Any]:
        """The arguments with a prompt of n tokens replaced by the chosen ones; as they are where all stay.

        real `(B, n)` bool marks tokens that are not padding, None for all. first: the runner of the choosing layer.
        """
        name = "input_ids" if kwargs.get("input_ids") is not None else "inputs_embeds"
        inputs: Tensor = kwargs[name]
        n, wanted = inputs.shape[1], self._wanted(kwargs, inputs)
        sizes = [n] * inputs.shape[0] if real is None else real.sum(-1).tolist()
        prompts = [size - wanted + 1 for size in sizes]
        if min(prompts) < 1 or all(self.method.size(size) >= size for size in prompts):
            return kwargs
        call = self._first_pass(kwargs)
        rows: list[int | None] = [None] if real is None else list(range(len(sizes)))
        places: list[Tensor] = []
        for row in rows:
            at = None if row is None or real is None else real[row].nonzero().flatten()
            own = slice(None) if row is None else slice(row, row + 1)
            q, k = (x[own] if at is None else x[own][:, :, at] for x in (call.q, call.k))
            end = k.shape[2] - wanted + 1
            ctx = first.prompt_context(replace(call, q=q, k=k, v=k), row, end)
            ids = self.method.choose(ctx, q[:, :, :end], k[:, :, :end])
            tail = torch.arange(end, k.shape[2], device=ids.device).expand(ids.shape[0], -1)
            for one in torch.cat([ids, tail], 1):
                places.append(one if at is None else at[one])
        given = kwargs.get("logits_to_keep")
        self.chosen = Chosen(places, sizes, n, wanted, scatter=given is None or (isinstance(given, int) and given == 0))
        self._fresh = True
        return self._second_pass(kwargs, name, inputs)

    def _wanted(self, kwargs: dict[str, Any], inputs: Tensor) -> int:
        """How many of the newest tokens the caller needs logits of; ValueError for arguments that no shortened prompt can serve."""
        slug = self.method.info.slug
        other = [
            key for key, value in kwargs.items()
            if isinstance(value, Tensor) and key not in ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "logits_to_keep")
        ]  # fmt: skip
        if other or kwargs.get("output_hidden_states") or kwargs.get("return_dict") is False:
            what = ", ".join(other) or ("output_hidden_states" if kwargs.get("output_hidden_states") else "return_dict=False")
            raise ValueError(f"{slug} runs the model on a part of the prompt, which {what} can't follow: leave it out")
        positions, asked = kwargs.get("position_ids"), kwargs.get("logits_to_keep")
        if isinstance(asked, Tensor) or (positions is not None and positions.ndim != 2):
            raise ValueError(f"{slug} takes logits_to_keep as a number and position_ids as (batch, tokens)")
        return min(asked, inputs.shape[1]) if asked else 1

    def _first_pass(self, kwargs: dict[str, Any]) -> LayerCall:
        """Layers 0 ... r - 1 on the whole prompt, and the queries and keys of layer r."""
        self.running = True
        try:
            self.model.forward(**{**kwargs, "past_key_values": None, "use_cache": False})
        except Reached as reached:
            return reached.call
        finally:
            self.running = False
        slug = self.method.info.slug
        raise ValueError(f"{type(self.model).__name__} never called the attention of layer {self.layer}, where {slug} chooses")

    def _second_pass(self, kwargs: dict[str, Any], name: str, inputs: Tensor) -> dict[str, Any]:
        """The chosen tokens, shorter rows padded in front."""
        assert self.chosen is not None
        longest = self.chosen.longest
        pads = [longest - len(row) for row in self.chosen.places]
        slots = torch.stack([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(self.chosen.places, pads, strict=True)])
        mask = torch.arange(longest, device=inputs.device) >= torch.tensor(pads, device=inputs.device).unsqueeze(1)
        picked = torch.gather(inputs, 1, slots if inputs.ndim == 2 else slots.unsqueeze(-1).expand(-1, -1, inputs.shape[-1]))
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        return {**kwargs, name: picked, "attention_mask": mask.long(), "position_ids": positions}

    def prepare(self, layers: dict[int, KVLayer], real: Tensor | None) -> None:
        """Tell the cache's layers which places the tokens to come have."""
        if not self._fresh or self.chosen is None:
            return
        found, longest = self.chosen, self.chosen.longest
        places = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in found.places])
        missing = None if real is None else [(~row).nonzero().flatten().tolist() for row in real]
        for layer in layers.values():
            layer.place(places.to(torch.int32), found.n, missing, found.wanted)

    # -- after a forward pass ----------------------------------------------------------------------------------------------

    def settle(self, output: Any, layers: dict[int, KVLayer], runners: dict[int, LayerRunner], padded: bool) -> Any:
        """Logits at the places of the chosen tokens (0 elsewhere), and counts as one dense run over the prompt would have had them."""
        if not self._fresh or self.chosen is None:
            return output
        self._fresh, found = False, self.chosen
        rows = list(zip(found.real, found.places, strict=True)) if padded else [(found.n, found.places[0])]
        for index, runner in runners.items():
            for size, places in rows:
                k, whole = len(places), size * (size + 1) / 2
                stored = k * size - k * (k - 1) / 2 if layers else k * (k + 1) / 2
                runner.stats.prefill.add(0, (whole if index >= self.layer else 0) - stored)
        if layers:
            leader = next(iter(layers.values()))
            for row, (size, places) in enumerate(zip(found.real, found.places, strict=True)):
                note = torch.tensor([[size - len(places), found.n - found.wanted + 1]])
                state = leader.sequence(row if leader.padded else None)
                state[DROPPED] = note if leader.padded or row == 0 else torch.cat([state[DROPPED], note])
        if found.scatter:
            full = output.logits.new_zeros(len(found.places), found.n, output.logits.shape[-1])
            for row, places in enumerate(found.places):
                full[row, places] = output.logits[row, -len(places) :]
            output.logits = full
        return output


def follow(kwargs: dict[str, Any], inputs: Tensor, leader: KVLayer, mask: Tensor | None) -> dict[str, Any]:
    """The arguments of a call on a cache whose prompt was shortened: positions continue from the tokens that were run.

    Without a shortened prompt they are as they were. ValueError when tokens of that prompt itself were taken back.
    """
    if leader.tail is None:
        return kwargs
    states = [leader.sequence(row) for row in leader.rows()]
    if not any(DROPPED in state for state in states):
        return kwargs
    notes = torch.cat([state[DROPPED] for state in states]).to(inputs.device)
    if leader.seen < int(notes[:, 1].max()):
        raise ValueError("tokens of a prompt that was run in part only were taken back: begin again with a new cache")
    given = kwargs.get("position_ids")
    if given is None:
        new = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device) if mask is None else mask[:, leader.seen :].long()
        seen = [leader.seen] * len(inputs) if not leader.padded else [leader.real_seen(row) for row in range(len(inputs))]
        given = torch.tensor(seen, device=inputs.device).unsqueeze(1) + (new.cumsum(1) - 1).clamp(min=0)
    return {**kwargs, "position_ids": given - notes[:, :1]}
