"""What a method may know at call time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from saccade.core.layout import HeadLayout
from saccade.core.partial import Partial
from saccade.core.plan import Plan
from saccade.core.rotary import Rotary
from saccade.core.selection import Selection

Phase = Literal["prefill", "decode", "cache", "mixer"]
Attend = Callable[..., Tensor]  # (q, k, v, selection or None, **options)
AttendPartial = Callable[..., Partial]


def _no_partial(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None, **options: Any) -> Partial:
    raise ValueError("this context gives whole outputs only: make it with partial= for methods that merge partial results")


def _not_counted(pairs: float) -> None:
    """Where nobody keeps count."""


class EncodedEntries(Protocol):
    """The entries of a layer of which some lie encoded, for decode methods that score every key. What it reads is decoded a piece at a
    time and not kept."""

    def dots(self, q: Tensor) -> Tensor:
        """q `(B, Hq, D)` times all keys: `(B, Hq, n)` float32 (float64 for float64)."""
        ...

    def weighted_values(self, weights: Tensor) -> Tensor:
        """weights `(B, Hq, n)` times all values: `(B, Hq, Dv)`."""
        ...


@dataclass(kw_only=True)
class LayerContext:
    """One attention layer, one sequence (or a batch of equally long ones without padding).

    layer, layers: index of this layer and their number. layout: head counts and dims as attention sees them.
    phase: where the method is called: "prefill" (many queries), "decode" (one) or "cache".
    scale: factor on q.k before softmax. softcap: `cap * tanh(logit / cap)` where the model uses one.
    seen: tokens of the sequence so far, those of this call included (in decoding: up to the query at hand). tokens: all of them.
    hidden: the layer's inputs `(B, m, C)` for the m tokens of this call, for methods whose `Info.needs` has "hidden"; else None.
    segments: in decoding, the sealed parts of the cache that stand before k and v, for the method that made them.
    entries: in decoding over a cache that another method encoded, what reads its entries, else None. k and v then tell shapes only (their
    numbers are nan), and `attend` over them decodes what is selected. For methods whose `Info.reads_encoded` is set.
    rotary: the model's rotary embedding, None where it has none or one that can't be turned further.
    plan: what calibration found, or None. plans: of all methods at hand, by slug, for a method that runs another one inside.
    state: this layer's own per-sequence state; tensors in it have the batch first, other objects offer `reorder(rows)`.
    shared: across the layers of one forward pass (in decoding: of one query). sequence: across the layers for as long as the sequence
    lives, with the rules of state.
    attend: `attend(q, k, v, selection, **options) -> Tensor` runs softmax attention over a selection (None: dense) with this layer's
    scale and softcap, and counts the pairs it computed; options are those of `saccade.ops.attend` (q_positions, impl, ...).
    partial: the same as a Partial with its log-sum-exp, to be merged with others. Calls may cover some rows or heads only.
    count: `count(pairs)` adds the work of a method that computes scores itself, in score pairs, the mean over batch and heads.
    recorded: whether the step stands for others that repeat it (`Info.recordable`): it attends once, through `attend`.
    seed: for methods that sample.
    """

    layer: int
    layers: int
    layout: HeadLayout
    scale: float
    attend: Attend
    partial: AttendPartial = _no_partial
    phase: Phase = "prefill"
    count: Callable[[float], None] = _not_counted
    softcap: float | None = None
    seen: int = 0
    tokens: int = 0
    hidden: Tensor | None = None
    segments: Sequence[Any] = ()
    entries: EncodedEntries | None = None
    rotary: Rotary | None = None
    plan: Plan | None = None
    plans: Mapping[str, Plan] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    sequence: dict[str, Any] = field(default_factory=dict)
    recorded: bool = False
    seed: int = 0

    def publish(self, selection: Selection) -> None:
        """Make this the layer's selection of this step: later layers may read it again."""
        self.shared.setdefault("selections", {})[self.layer] = selection

    def published(self, layer: int) -> Selection:
        """What `layer` published in this step; ValueError when it published nothing."""
        found = self.shared.get("selections", {}).get(layer)
        if found is None:
            raise ValueError(f"layer {self.layer} reads the selection of layer {layer} again, which has made none in this step")
        return found

    def found(self, name: str) -> Tensor:
        """The calibrated tensor `name` of this layer; ValueError when no plan was given or it lacks the entry."""
        if self.plan is None:
            raise ValueError(f"layer {self.layer} has no calibration plan: run `saccade calibrate` and pass plan=")
        return self.plan.tensor(self.layer, name)

    def inside(self, slug: str) -> LayerContext:
        """The context for a method that runs inside another one: the same layer and sequence, its own plan."""
        return replace(self, plan=self.plans.get(slug))

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator fixed by seed, layer and tokens seen: the same run draws the same numbers."""
        generator = torch.Generator(device=device)
        # a prime below 2^63 keeps any seed in torch's range
        generator.manual_seed(((self.seed * 1_000_003 + self.layer) * 1_000_003 + self.seen) % (2**63 - 25))
        return generator
