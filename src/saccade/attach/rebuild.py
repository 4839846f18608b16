"""Running dropped tokens again beside the new ones, in every forward pass, for cache policies that bring tokens back.

The forward pre-hook of the session keeps the id, the place and the position of each token, asks the policy which of those that no longer
lie in the cache are to come back, and puts their ids in front of the new ones, at their own positions. In each layer they attend to the
entries up to their own place, and to one another; their keys and values join the cache in the order of places; the new tokens then see
all of it. Logits are those of the new tokens.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach.models import managed_layers, text_config
from saccade.cache import KVLayer
from saccade.core import CachePolicy, Plan, Rebuilding

IDS, POSITIONS = "ids read", "positions read"  # in the sequence's state: int32 (B, n), beside `Rebuilding.PLACES`


@dataclass
class Rebuilder:
    """places: of the tokens that run again in this pass, int32 `(B, r)`, rows with fewer filled in front; None when there are none."""

    model: PreTrainedModel
    method: Rebuilding
    plan: Plan | None
    places: Tensor | None = None
    _new: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, policy: CachePolicy | None, plans: dict[str, Plan]) -> Rebuilder | None:
        """None for policies that bring nothing back; ValueError where a model or a chain of policies can't serve one that does."""
        found = [] if policy is None else [member for member in policy.members if isinstance(member, Rebuilding)]
        if not found:
            return None
        method, name = found[0], type(model).__name__
        slug = method.info.slug
        if policy is not method:
            raise ValueError(f"{slug} brings tokens back to a cache that it alone decides on: use it without other cache policies")
        if len(managed_layers(model)) != int(text_config(model).num_hidden_layers):
            raise ValueError(f"{slug} runs tokens again, which other layers would store twice: use a model of full-attention layers")
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{slug} runs tokens again at their own positions, and {name} takes no position_ids")
        return cls(model, method, plans.get(slug))

    def extend(
        self, kwargs: dict[str, Any], layers: dict[int, KVLayer], real: Tensor | None
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The arguments of a call, and which of its tokens `(B, r + m)` are not padding, with the tokens that come back in front."""
        slug = self.method.info.slug
        ids, positions, leader = kwargs.get("input_ids"), kwargs.get("position_ids"), next(iter(layers.values()))
        if ids is None:
            raise ValueError(f"{slug} runs tokens again by their ids: give input_ids instead of inputs_embeds")
        batch, m = ids.shape
        if positions is None:
            positions = torch.arange(leader.seen, leader.seen + m, device=ids.device).unsqueeze(0)
        if positions.ndim != 2:
            raise ValueError(f"{slug} runs tokens again at positions (batch, tokens), not {tuple(positions.shape)}")
        positions, places = positions.expand(batch, -1), leader.incoming(m, ids.device).expand(batch, -1)
        if real is not None:
            leader.states.split(batch)
        back = []
        for row in leader.rows():
            mine = slice(None) if row is None else slice(row, row + 1)
            own = slice(None) if row is None or real is None else real[row]
            back += self._of_row(leader, row, ids[mine][:, own], places[mine][:, own], positions[mine][:, own])
        self._new, r = m, max(x.shape[1] for x in back)
        self.places = None
        if not r:
            return kwargs, real
        self._check(kwargs)
        padded = torch.stack([F.pad(x, (r - x.shape[1], 0)) for x in back])  # (B, 3, r)
        there = torch.stack([torch.arange(r, device=ids.device) >= r - x.shape[1] for x in back])
        if real is not None or not bool(there.all()):
            real = torch.cat([there, torch.ones_like(ids, dtype=torch.bool) if real is None else real], 1)
        self.places = padded[:, 1].contiguous()
        for layer in layers.values():
            layer.bring_back(self.places)
        longer = {
            "input_ids": torch.cat([padded[:, 0].to(ids.dtype), ids], 1),
            "position_ids": torch.cat([padded[:, 2].to(positions.dtype), positions], 1),
        }
        if kwargs.get("attention_mask") is not None:
            longer["attention_mask"] = F.pad(kwargs["attention_mask"], (0, r), value=1)
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            longer["logits_to_keep"] = kwargs["logits_to_keep"] + r
        return {**kwargs, **longer}, real

    def _of_row(self, leader: KVLayer, row: int | None, ids: Tensor, places: Tensor, positions: Tensor) -> list[Tensor]:
        """Ids, places and positions `(3, r)` of what comes back, of one batch row or of each; the new tokens are taken down."""
        state, names = leader.sequence(row), (IDS, Rebuilding.PLACES, POSITIONS)
        new = [x.to(torch.int32) for x in (ids, places, positions)]
        if not ids.shape[1]:
            return [torch.stack([x[0] for x in new])]
        known = [state.get(name, x[:, :0]) for name, x in zip(names, new, strict=True)]
        # what was taken back is as if it had never been read
        known = [x[:, : int((known[1][0] < leader.seen).sum())] for x in known]
        held = self._held(leader, row, known[1])
        with torch.no_grad():
            embedded = self.model.get_input_embeddings()(ids)
            chosen = self.method.recall(state, self.plan, embedded, held)
        for name, old, more in zip(names, known, new, strict=True):
            state[name] = torch.cat([old, more], 1)
        return list(torch.stack([x.gather(1, chosen) for x in known], 1))

    def _held(self, leader: KVLayer, row: int | None, places: Tensor) -> Tensor:
        """Which of the tokens read so far lie in the cache, bool `(B, n)`."""
        held = torch.zeros_like(places, dtype=torch.bool)
        if leader.tail is None or not leader.physical:
            return held
        slots = leader.open(row)
        stored = slots.side["positions"][:, 0].contiguous()
        at = torch.searchsorted(places.contiguous(), stored)
        if not places.shape[1] or bool((places.gather(1, at.clamp(max=places.shape[1] - 1)) != stored).any()):
            slug = self.method.info.slug
            raise ValueError(f"{slug} has not read all tokens of this cache and can't run them again: begin with an empty one")
        return held.scatter(1, at, True)

    def _check(self, kwargs: dict[str, Any]) -> None:
        """ValueError for arguments that go with the new tokens one by one."""
        usual = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
        other = [key for key, value in kwargs.items() if isinstance(value, Tensor) and key not in usual]
        other += [key for key in ("output_hidden_states",) if kwargs.get(key)]
        other += ["return_dict=False"] if kwargs.get("return_dict") is False else []
        if other:
            slug, what = self.method.info.slug, ", ".join(other)
            raise ValueError(f"{slug} runs more tokens than the model was given, which {what} can't follow: leave it out")

    def settle(self, output: Any) -> Any:
        """The output without the logits of tokens that ran again."""
        if self.places is not None:
            output.logits = output.logits[:, -min(self._new, output.logits.shape[1]) :]
            self.places = None
        return output
