"""Bases for matryoshkakv: trained so that any first few coordinates serve, and ranks searched by what the model predicts.

The model runs on text with every layer's keys and values taken through their first r coordinates and back,

    k' = mu_k + (k - mu_k) U_k[:, :r_k] U_k[:, :r_k]^T,   v' likewise,        U = (I - A/2)^-1 (I + A/2),  A = X - X^T

which gives the logits and outputs of a cache of these ranks. For each batch r_k and r_v are drawn from {D/8, 2D/8, ..., D} for each layer
and key/value head, and only X and mu learn, from

    share KL(teacher || student) + (1 - share) cross-entropy of the next token,        share 0.25, the teacher the model as it is.

Source: matryoshkakv, arXiv 2410.14731 (rate 1e-3, cosine, 100 steps of warm-up; greedy search, form inferred).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from saccade.attach import Session
from saccade.attach.models import managed_layers
from saccade.core import Info, LayerContext, Plan, Prefill, Selection
from saccade.parts.cayley import cayley, inverse_cayley, signed
from saccade.parts.rank_search import LEVELS, rank_of

NAMES = ("key", "value")


@dataclass(kw_only=True)
class Coordinates:
    """By (layer, "key" or "value"): x `(H, D, D)` of the Cayley transform, means `(H, D)`, and levels `(H,)` int64 from 1 to LEVELS."""

    x: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    mean: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    levels: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, plan: Plan) -> Coordinates:
        """A plan's, with all levels."""
        if plan.slug != "matryoshkakv":
            raise ValueError(f"this is a plan for {plan.slug}: give one that saccade.calibrate made for matryoshkakv")
        plan.check_model(model)
        device, new = next(model.parameters()).device, cls()
        for layer in managed_layers(model):
            for name in NAMES:
                basis = plan.tensor(layer, f"{name}_basis")
                new.x[layer, name] = inverse_cayley(signed(basis)).float().to(device)
                new.mean[layer, name] = plan.tensor(layer, f"{name}_mean").to(device, copy=True)
                new.levels[layer, name] = torch.full(basis.shape[:1], LEVELS)
        return new

    def through(self, layer: int, name: str, entries: Tensor) -> Tensor:
        """entries `(B, H, n, D)` in their first coordinates and back."""
        exact = torch.promote_types(entries.dtype, torch.float32)
        basis, mean = cayley(self.x[layer, name]).to(exact), self.mean[layer, name].to(exact).unsqueeze(1)
        ranks = torch.tensor([rank_of(int(level), entries.shape[-1]) for level in self.levels[layer, name]], device=entries.device)
        kept = torch.arange(entries.shape[-1], device=entries.device) < ranks.unsqueeze(-1)
        own = ((entries.to(exact) - mean) @ basis) * kept.unsqueeze(1)
        return (own @ basis.mT + mean).to(entries.dtype)


class _Projected(Prefill):
    """Dense attention over keys and values that went through their coordinates."""

    info = Info(slug="projected", phase="prefill", needs=frozenset({"training"}))
    coordinates: Coordinates

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.coordinates
        return ctx.attend(q, c.through(ctx.layer, "key", k), c.through(ctx.layer, "value", v), None)


def projecting_session(model: PreTrainedModel, coordinates: Coordinates) -> Session:
    """A session in which attention reads keys and values through `coordinates`, whose levels may change between calls."""
    projected = _Projected()
    object.__setattr__(projected, "coordinates", coordinates)
    return Session(model, projected, None, None, {}, "prompt", "auto", 0)


def train_bases(
    model: PreTrainedModel, batches: Iterable[Tensor], plan: Plan, *, steps: int, rate: float = 1e-3, warmup: int = 100,
    share: float = 0.25, seed: int = 0, progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train the bases and means of `plan`, which `saccade.calibrate` made, and return it with them; the order of ranks stays.

    batches: token ids `(B, N)` without padding, at least `steps` of them, one a step. rate: of Adam, with `warmup` steps up and a cosine
    down to 0. share: of the divergence in the loss. seed: decides the ranks drawn. progress: gets {"step", "loss", "kl"} after each
    step. The model's parameters are left as they are. ValueError for another method's plan and where the batches end too soon.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_bases got steps={steps!r}: give a whole number of at least 1")
    if not 0 <= share <= 1:
        raise ValueError(f"train_bases got share={share!r}: give a number from 0 to 1")
    coordinates, generator = Coordinates.of(model, plan), torch.Generator().manual_seed(seed)
    learned = [*coordinates.x.values(), *coordinates.mean.values()]
    optimizer = torch.optim.Adam(learned, lr=rate)
    supply, device = iter(batches), next(model.parameters()).device
    with _only(model, learned):
        for step in range(steps):
            ids = _next(supply, step, steps).to(device)
            for at, levels in coordinates.levels.items():
                coordinates.levels[at] = torch.randint(1, LEVELS + 1, levels.shape, generator=generator)
            with torch.no_grad():
                teacher = _log_probabilities(model, ids)
            with torch.enable_grad(), projecting_session(model, coordinates):
                student = _log_probabilities(model, ids)
                divergence = _divergence(teacher, student)
                loss = share * divergence + (1 - share) * cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                progress({"step": step, "loss": float(loss.detach()), "kl": float(divergence.detach())})
    tensors = dict(plan.tensors)
    for (layer, name), x in coordinates.x.items():
        tensors[f"layer.{layer}.{name}_basis"] = cayley(x.detach().double()).float().cpu()
        tensors[f"layer.{layer}.{name}_mean"] = coordinates.mean[layer, name].detach().cpu()
    return replace(plan, tensors=tensors, notes={**plan.notes, "trained_steps": steps, "rate": rate, "seed": seed})


@torch.no_grad()
def search_ranks(
    model: PreTrainedModel, batches: Sequence[Tensor], plan: Plan, *, at_once: float = 0.25,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """`plan` with an order of ranks found by the divergence of the model's predictions on batches of token ids `(B, N)`.

    In each round every head's keys, and values, lose an eighth on their own; of those that cost least the share `at_once` lose it for
    good. A round takes a forward pass for each of them and batch. progress: gets {"kept", "kl"} (shares of all coordinates; the least of
    the round) after each round. ValueError for another method's plan, without batches and for a share that is none.
    """
    if not batches:
        raise ValueError("search_ranks was given no token batches: give at least one")
    if not 0 < at_once <= 1:
        raise ValueError(f"search_ranks got at_once={at_once!r}: give a share above 0 and at most 1")
    coordinates, device = Coordinates.of(model, plan), next(model.parameters()).device
    inputs = [ids.to(device) for ids in batches]
    teachers = [_log_probabilities(model, ids) for ids in inputs]
    levels = coordinates.levels
    shares = {at: torch.zeros(len(own), LEVELS) for at, own in levels.items()}
    units = left = LEVELS * sum(len(own) for own in levels.values())
    with projecting_session(model, coordinates):
        while candidates := [(at, head) for at, own in levels.items() for head in range(len(own)) if own[head] > 1]:
            costs = []
            for at, head in candidates:
                levels[at][head] -= 1
                found = [_divergence(t, _log_probabilities(model, ids)) for t, ids in zip(teachers, inputs, strict=True)]
                costs.append(float(torch.stack(found).mean()))
                levels[at][head] += 1
            order = sorted(range(len(costs)), key=costs.__getitem__)  # stable: ties to the earlier layer and lower head
            for chosen in order[: max(1, int(at_once * len(order)))]:
                at, head = candidates[chosen]
                levels[at][head] -= 1
                shares[at][head, int(levels[at][head])] = left / units
                left -= 1
            if progress is not None:
                progress({"kept": left / units, "kl": costs[order[0]]})
    tensors = {**plan.tensors, **{f"layer.{layer}.{name}_shares": own for (layer, name), own in shares.items()}}
    return replace(plan, tensors=tensors, notes={**plan.notes, "ranks_by": "predictions", "at_once": at_once})


@torch.no_grad()
def divergence_at(model: PreTrainedModel, ids: Tensor, plan: Plan, level: int) -> float:
    """Mean KL, in nats a token, of the model's predictions on ids `(B, N)` from those with all ranks `level` eighths of D."""
    coordinates, ids = Coordinates.of(model, plan), ids.to(next(model.parameters()).device)
    coordinates.levels = {at: torch.full_like(own, level) for at, own in coordinates.levels.items()}
    teacher = _log_probabilities(model, ids)
    with projecting_session(model, coordinates):
        return float(_divergence(teacher, _log_probabilities(model, ids)))


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of log probabilities `(B, N, vocabulary)`, mean over tokens."""
    return kl_div(student, teacher, reduction="sum", log_target=True) / teacher[..., 0].numel()


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


def _next(supply: Iterator[Tensor], step: int, steps: int) -> Tensor:
    ids = next(supply, None)
    if ids is None:
        raise ValueError(f"the batches ended after {step} of {steps} steps: give one a step")
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"batch {step} has shape {tuple(ids.shape)}: expected (B, N) token ids with N >= 2")
    return ids


@contextmanager
def _only(model: PreTrainedModel, learned: Sequence[Tensor]) -> Iterator[None]:
    """A block in which `learned` need gradients and the model's parameters do not."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for x in learned:
            x.requires_grad_(True)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
        for x in learned:
            x.requires_grad_(False)
