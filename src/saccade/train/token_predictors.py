"""Training the predictors of dynamic-llava: the model is frozen, decisions are drawn with a Gumbel softmax.

    keep_j ~ hard Gumbel softmax of log softmax(keep, drop) at temperature tau, one-hot forward, soft backward
    w_ij = keep_j exp(l_ij - max l_i) for j < i, with 1 for keep_i itself,   P = w / (eps + sum w)      in all layers from l on
    loss = mean of -log P(next token) over the answer  +  penalty [(mean keep of images - r_v)^2 + mean over texts of (mean keep - r_t)^2]

tau falls exponentially from 1 to 0.1. All tokens are computed; what is dropped is only masked. Texts that are too short to have a rate aim
at their own mean, that is, they add nothing.

Source: dynamic-llava, arXiv 2412.00876, section 3.3 (penalty 100, predictor rate 3e-4, d 512; outputs from 50 tokens, instructions from 25;
there the model learns as well).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.attach import Session
from saccade.attach.models import managed_layers
from saccade.core import Info, LayerContext, Plan, Prefill, Selection, fingerprint, over_groups
from saccade.methods import build
from saccade.methods.cache.dynamic_llava import DynamicLlava
from saccade.parts.token_predictor import TokenPredictor
from saccade.train.gates import Sample, next_sample

KINDS = ("image", "instruction", "output")
EPS = 1e-12  # of the sum of weights: bounds the gradient where all that matters was dropped


@dataclass(frozen=True, kw_only=True)
class _Masked(Prefill):
    """Attention under decisions that carry gradients, from layer l on: `decide(hidden) -> (B, N)` is asked once a pass."""

    layer: int
    info = Info(slug="dynamic-llava in training", phase="prefill", needs=frozenset({"hidden", "training"}))

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ctx.layer < self.layer:
            return ctx.attend(q, k, v, None)
        if "keep" not in ctx.shared:
            ctx.shared["keep"] = self.decide(ctx.hidden)  # pyright: ignore[reportAttributeAccessIssue]
        keep: Tensor = ctx.shared["keep"]
        return masked_attention(q, k, v, keep, scale=ctx.scale, softcap=ctx.softcap)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Causal attention `(B, Hq, N, Dv)` in which key j weighs `keep (B, N)` times its exponential, and 1 for its own query.

    Differentiable in all of them. The whole map is held, float32 (float64 for float64).
    """
    exact, n, heads = torch.promote_types(q.dtype, torch.float32), q.shape[2], k.shape[1]
    logits = over_groups(q.to(exact).unflatten(1, (heads, -1)), k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    past = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)
    own = torch.eye(n, dtype=torch.bool, device=q.device)
    logits = logits.masked_fill(~(past | own), -torch.inf)
    weight = (logits - logits.detach().amax(-1, keepdim=True)).exp() * (keep.to(exact)[:, None, None, None] * past + own)
    return (over_groups(weight, v.to(exact)) / (weight.sum(-1, keepdim=True) + EPS)).flatten(1, 2).to(q.dtype)


def masking_session(model: PreTrainedModel, decide: Callable[[Tensor], Tensor], *, layer: int) -> Session:
    """A session in which layers from `layer` on weigh key j by `decide(hidden (B, N, C)) -> (B, N)`, 0 or 1, and a token its own by 1."""
    masked = _Masked(layer=layer)
    object.__setattr__(masked, "decide", decide)
    return Session(model, masked, None, None, {}, "prompt", "auto", 0)


def new_predictors(model: PreTrainedModel, method: DynamicLlava, *, dim: int = 512, seed: int = 0) -> nn.ModuleDict:
    """Untrained predictors of the three kinds."""
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.ModuleDict({kind: TokenPredictor(width, dim, method.heads, 2 if kind == "image" else 0) for kind in KINDS})


def predictors_plan(model: PreTrainedModel, method: DynamicLlava, predictors: nn.ModuleDict, notes: dict[str, Any] | None = None) -> Plan:
    """The plan of a set of predictors."""
    tensors = {f"layer.{method.layer}.{name}": x.detach().cpu() for name, x in predictors.state_dict().items()}
    facts = {"model": getattr(model.config, "name_or_path", "") or type(model).__name__, **(notes or {})}
    return Plan(slug=method.info.slug, spec=method.spec, fingerprint=fingerprint(model), tensors=tensors, notes=facts)


def kinds_of(answers: Tensor, text: int) -> Tensor:
    """Which kind each token of `(B, N)` is, 0 image, 1 instruction, 2 output, from the positions that predict an answer.

    What comes after the first of these is output, the `text` tokens before are instruction, all others stand for images.
    """
    first = answers.int().argmax(1, keepdim=True)
    places = torch.arange(answers.shape[1], device=answers.device)
    return (places > first - text).long() + (places > first).long()


def train_token_predictors(
    model: PreTrainedModel, samples: Iterable[Sample], *, steps: int, method: str | DynamicLlava = "dynamic-llava", rate: float = 3e-4,
    penalty: float = 100.0, dim: int = 512, least: tuple[int, int] = (25, 50), seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train the predictors for a frozen model and return the plan that `dynamic-llava` needs.

    samples: at least `steps`, one a step: token ids `(B, N)` and a bool mask of the positions that predict an answer. method: its rates are
    aimed at, its `text` says how many tokens before the answer are instruction. penalty: lambda. dim: d. least: tokens from which an
    instruction and an output have a rate. progress: gets {"step", "loss", "task", "image", "instruction", "output"} after every step, the
    last three being mean keeps. ValueError where samples end too soon or a layer of the model can't be attached.
    """
    chosen = build(method)
    if not isinstance(chosen, DynamicLlava):
        raise ValueError(f"train_token_predictors makes plans for dynamic-llava, not for {chosen.info.slug}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_token_predictors got steps={steps!r}: give a whole number of at least 1")
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if len(managed_layers(model)) != layers or chosen.layer >= layers:
        raise ValueError(f"{type(model).__name__} needs full attention in all layers and more than {chosen.layer} of them")
    device = next(model.parameters()).device
    predictors = new_predictors(model, chosen, dim=dim, seed=seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(predictors.parameters(), lr=rate)
    supply, trained = iter(samples), [(p, p.requires_grad) for p in model.parameters()]
    aims = (chosen.vision, chosen.instruction, chosen.output)
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        for step in range(steps):
            ids, answers = (x.to(device) for x in next_sample(supply, step, steps))
            kinds, drawn = kinds_of(answers, chosen.text), {}
            temperature = 0.1 ** (step / max(1, steps - 1))

            def decide(hidden: Tensor, kinds: Tensor = kinds, drawn: dict[str, Tensor] = drawn, temperature: float = temperature) -> Tensor:
                drawn["keep"] = draw_keep(predictors, hidden.detach(), kinds, temperature, generator)
                return drawn["keep"]

            with torch.enable_grad(), masking_session(model, decide, layer=chosen.layer):
                logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            task = F.cross_entropy(logits[answers[:, :-1]], ids[:, 1:][answers[:, :-1]])
            means = keep_means(drawn["keep"], kinds, least)
            distances = [(mean[there] - aim) ** 2 for mean, aim in zip(means, aims, strict=True) if bool((there := ~mean.isnan()).any())]
            loss = task + penalty * sum(distance.mean() for distance in distances)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress is not None:
                told = {kind: float(mean.detach().nanmean()) for kind, mean in zip(KINDS, means, strict=True)}
                progress({"step": step, "loss": float(loss.detach()), "task": float(task.detach()), **told})
    finally:
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
    return predictors_plan(model, chosen, predictors, {"steps": steps, "penalty": penalty, "rate": rate, "seed": seed})


def draw_keep(predictors: nn.ModuleDict, hidden: Tensor, kinds: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Decisions `(B, N)`, 0 or 1 in value with the gradient of the soft ones, each token by the predictor of its kind."""
    rows = []
    for row, own in zip(hidden, kinds, strict=True):
        scores = row.new_zeros(len(own), 2, dtype=torch.float32)
        for number, kind in enumerate(KINDS):
            places = (own == number).nonzero().flatten()
            if places.numel():
                scores = scores.index_copy(0, places, predictors[kind](row[None, places])[0])
        rows.append(scores)
    noise = torch.rand(*kinds.shape, 2, generator=generator).clamp(1e-9, 1 - 1e-7).to(hidden.device)
    soft = ((torch.stack(rows) - (-noise.log()).log()) / temperature).softmax(-1)[..., 0]
    return (soft > 0.5).to(soft.dtype) + soft - soft.detach()


def keep_means(keep: Tensor, kinds: Tensor, least: tuple[int, int] = (0, 0)) -> list[Tensor]:
    """Mean decision of each kind and row, `(B,)` each in the order of `KINDS`; nan where a text has fewer than `least` tokens."""
    means = []
    for number, few in enumerate((1, *least)):
        own = kinds == number
        mean = (keep * own).sum(1) / own.sum(1).clamp(min=1)
        means.append(torch.where(own.sum(1) >= max(1, few), mean, torch.nan))
    return means
