"""Training the gates of attention-gate: the model is frozen, only the gates learn what each head can do without.

Forward, a token's key counts or it does not; backward, its flag is p (straight through):

    f = [p > tau] + p - stop(p),    w_ij = f_j exp(l_ij) for j < i, exp(l_ii) for itself,    P = w / sum w
    loss = mean over answer positions of -log P(next token)  +  alpha |mean p - beta|

with the mean over layers, heads and tokens. beta is the share of tokens to keep. Attention is computed in full, for short sequences.

Source: attention-gate, arXiv 2410.12876, section 3.2 (alpha about 5, beta 0.4 to 0.5, tau 0.5; p close to 1 at first).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach import Session
from saccade.attach.models import managed_layers
from saccade.core import Info, LayerContext, Plan, Prefill, Selection, fingerprint, over_groups
from saccade.methods import build
from saccade.parts.token_gate import TokenGate
from saccade.train.gates import Sample, gate_shape, next_sample

BIAS = 2.0  # sigmoid(2) = 0.88: nearly all is kept at first
FURTHEST = 30.0  # an evicted key's logit above the kept ones counts up to here in the gradient


@dataclass(frozen=True, kw_only=True)
class _Gated(Prefill):
    """Attention under flags that carry gradients; the probabilities of each layer are collected in `seen`."""

    threshold: float
    info = Info(slug="attention-gate in training", phase="prefill", needs=frozenset({"hidden", "training"}))

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        return Selection.full(q.shape[2], k.shape[2], device=q.device)

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gates: list[TokenGate] = self.gates  # pyright: ignore[reportAttributeAccessIssue]
        assert ctx.hidden is not None
        features = gates[ctx.layer].features(ctx.hidden.detach())
        p = gates[ctx.layer].logits(*features).sigmoid()
        self.seen.append(p)  # pyright: ignore[reportAttributeAccessIssue]
        return flagged_attention(q, k, v, (p > self.threshold).to(p.dtype) + p - p.detach(), scale=ctx.scale, softcap=ctx.softcap)


def flagged_attention(q: Tensor, k: Tensor, v: Tensor, flags: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Causal attention `(B, Hq, N, Dv)` in which key j weighs `flags (B, Hk, N)` times its exponential, and 1 for its own query.

    Differentiable in all of them; flags are 0 or 1 in value. Float32 inside (float64 for float64).
    """
    exact, n, heads = torch.promote_types(q.dtype, torch.float32), q.shape[2], k.shape[1]
    logits = over_groups(q.to(exact).unflatten(1, (heads, -1)), k.to(exact).mT) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    past = torch.ones(n, n, dtype=torch.bool, device=q.device).tril(-1)
    weight = flags.to(exact)[:, :, None, None, :] * past + torch.eye(n, dtype=exact, device=q.device)
    top = logits.detach().masked_fill(weight.detach() == 0, -torch.inf).amax(-1, keepdim=True)
    weight = weight * (logits - top).clamp(max=FURTHEST).exp()
    out = over_groups(weight, v.to(exact)) / weight.sum(-1, keepdim=True)
    return out.flatten(1, 2).to(q.dtype)


def train_attention_gates(
    model: PreTrainedModel, samples: Iterable[Sample], *, steps: int, method: str = "attention-gate", rate: float = 0.01,
    alpha: float = 5.0, beta: float = 0.5, heads: int = 2, dim: int = 16, seed: int = 0,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train a gate for each layer of a frozen model and return the plan that `attention-gate` needs.

    samples: at least `steps`, one a step: token ids `(B, N)` and a bool mask of the positions whose next token counts. alpha, beta: of the
    loss. rate: of Adam. heads, dim: of the gates' own attention. seed: of their first values. progress: gets {"step", "loss", "task",
    "mean"} after every step, mean being that of p. ValueError as `saccade.train.gates.train_gates`.
    """
    if not 0 < beta <= 1 or alpha < 0:
        raise ValueError(f"train_attention_gates got alpha={alpha!r}, beta={beta!r}: give a weight of at least 0 and a share up to 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_attention_gates got steps={steps!r}: give a whole number of at least 1")
    device = next(model.parameters()).device
    if len(managed_layers(model)) != gate_shape(model)[0]:
        name = type(model).__name__
        raise ValueError(f"{name} has layers without full attention, which have no gate: train a model without them")
    gates = [TokenGate(*(x.to(device).requires_grad_() for x in gate)) for gate in new_gates(model, heads=heads, dim=dim, seed=seed)]
    gated = _Gated(threshold=float(getattr(build(method), "threshold", 0.5)))
    object.__setattr__(gated, "gates", gates)
    optimizer = torch.optim.Adam([x for gate in gates for x in gate], lr=rate)
    supply, trained = iter(samples), [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        for step in range(steps):
            ids, answers = (x.to(device) for x in next_sample(supply, step, steps))
            seen: list[Tensor] = []
            object.__setattr__(gated, "seen", seen)
            with torch.enable_grad(), Session(model, gated, None, None, {}, "prompt", "auto", 0):
                logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            task = F.cross_entropy(logits[answers[:, :-1]], ids[:, 1:][answers[:, :-1]])
            mean = torch.stack([p.mean() for p in seen]).mean()
            loss = task + alpha * (mean - beta).abs()
            optimizer.zero_grad()
            loss.backward()
            # towards the end ever smaller steps: |mean p - beta| has no slope that fades
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 2 * (steps - step) / steps)
            optimizer.step()
            if progress is not None:
                told = {"loss": loss, "task": task, "mean": mean}
                progress({"step": step, **{name: float(x.detach()) for name, x in told.items()}})
    finally:
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
    facts = {"steps": steps, "alpha": alpha, "beta": beta, "seed": seed}
    return attention_gates_plan(model, [TokenGate(*(x.detach() for x in gate)) for gate in gates], method, facts)


def new_gates(model: PreTrainedModel, *, heads: int = 2, dim: int = 16, seed: int = 0, bias: float = BIAS) -> list[TokenGate]:
    """Untrained gates, one a layer."""
    layers, kv_heads = gate_shape(model)
    width = int(model.config.get_text_config(decoder=True).hidden_size)
    generator = torch.Generator().manual_seed(seed)
    return [TokenGate.new(width, kv_heads, heads=heads, dim=dim, bias=bias, generator=generator) for _ in range(layers)]


def attention_gates_plan(
    model: PreTrainedModel, gates: list[TokenGate], method: str = "attention-gate", notes: dict[str, Any] | None = None
) -> Plan:
    """The plan of gates, one a layer."""
    chosen = build(method)
    tensors = {f"layer.{i}.{name}": x.cpu() for i, gate in enumerate(gates) for name, x in gate._asdict().items()}
    facts = {"model": getattr(model.config, "name_or_path", "") or type(model).__name__, **(notes or {})}
    return Plan(slug=chosen.info.slug, spec=chosen.spec, fingerprint=fingerprint(model), tensors=tensors, notes=facts)
