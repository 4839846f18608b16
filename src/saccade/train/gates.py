"""Head gates for duoattention: which heads a model needs far back, learned on facts that are asked for at the end of a long text.

The model runs twice on each sample. Once as it is; once with every layer's attention mixed per key/value head,

    out = a full_attention + (1 - a) streaming_attention,        a in [0, 1], 1 at first,

and only the gates a learn, from

    mean over answer positions of mean (hidden - hidden')^2  +  penalty mean |a|,        hidden: last hidden states, in float32.

Source: duoattention, arXiv 2410.10819, section 2.2 (Adam, rate 0.02 with warm-up and decay over a fifth of the steps each, penalty 0.05,
2000 steps, sinks 128, recent 256).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from saccade.attach import Session
from saccade.attach.capture import reading_session
from saccade.attach.models import managed_layers
from saccade.core import Info, LayerContext, Plan, Prefill, Selection, fingerprint
from saccade.methods import build
from saccade.parts.echo import places_of
from saccade.parts.static import compile_pattern, sink, window
from saccade.train.text import NOUNS, Grammar, insert_at_lines, needle_close, needle_question, needle_sentence

Sample = tuple[Tensor, Tensor]  # token ids (B, N) and a bool mask (B, N) of the positions that predict an answer
RAMP = 0.2  # share of the steps for warm-up, and for decay


@dataclass(frozen=True, kw_only=True)
class _Mixed(Prefill):
    """Both ways of attending, mixed by gates `(layers, Hk)` that may need gradients."""

    sinks: int
    recent: int
    info = Info(slug="gated", phase="prefill", needs=frozenset({"training"}))

    def select(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Selection:
        pattern = sink(self.sinks) | window(self.recent)
        return compile_pattern(pattern, q.shape[2], k.shape[2], block_q=1, block_k=1, device=q.device).selection

    def attend(self, ctx: LayerContext, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate: Tensor = self.gates[ctx.layer].to(q.dtype)  # pyright: ignore[reportAttributeAccessIssue]
        gate = gate.repeat_interleave(q.shape[1] // k.shape[1]).view(1, -1, 1, 1)
        rows, keys = torch.arange(q.shape[2], device=q.device).unsqueeze(1), torch.arange(k.shape[2], device=q.device)
        seen = (keys <= rows) & ((keys < self.sinks) | (rows - keys < self.recent))
        if ctx.softcap is None:
            near = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=ctx.scale, enable_gqa=True)
        else:
            bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)[None, None]
            near = ctx.attend(q, k, v, None, causal=False, bias=bias)
        return gate * ctx.attend(q, k, v, None) + (1 - gate) * near


def mixing_session(model: PreTrainedModel, gates: Tensor, *, sinks: int, recent: int) -> Session:
    """A session in which layer l mixes full attention with that over the first `sinks` and the last `recent` tokens by `gates[l] (Hk,)`."""
    mixed = _Mixed(sinks=sinks, recent=recent)
    object.__setattr__(mixed, "gates", gates)
    return Session(model, mixed, None, None, {}, "prompt", "auto", 0)


def train_gates(
    model: PreTrainedModel, samples: Iterable[Sample], *, steps: int, method: str = "duoattention", rate: float = 0.02,
    penalty: float = 0.05, sinks: int = 128, recent: int = 256, progress: Callable[[dict[str, float]], None] | None = None,
) -> Plan:  # fmt: skip
    """Train one gate for each key/value head of each layer and return the plan that `duoattention` needs.

    samples: at least `steps` of them, one a step; their order decides the result, there is no other randomness. penalty: on the mean
    gate (lambda). rate: of Adam, reached after a fifth of the steps. sinks, recent: tokens of the streaming attention. progress: gets
    {"step", "loss", "distance", "mean"} after every step. The model's parameters are left as they are.

    ValueError where the samples end too soon or one has no answer, and where a layer of the model can't be attached.
    """
    layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if len(managed_layers(model)) != layers:
        raise ValueError(f"{type(model).__name__} has layers without full attention, which have no gate: train a model without them")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"train_gates got steps={steps!r}: give a whole number of at least 1")
    device = next(model.parameters()).device
    gates = torch.ones(gate_shape(model), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=rate)
    supply, trained = iter(samples), [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in trained:
            parameter.requires_grad_(False)
        for step in range(steps):
            ids, answers = next_sample(supply, step, steps)
            with torch.no_grad():
                plain = _hidden(model, ids.to(device))
            with torch.enable_grad(), mixing_session(model, gates, sinks=sinks, recent=recent):
                mixed = _hidden(model, ids.to(device))
                distance = (mixed - plain)[answers.to(device)].square().mean()
                loss = distance + penalty * gates.abs().mean()
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / (RAMP * steps), (steps - step) / (RAMP * steps))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            if progress is not None:
                told = {"loss": loss, "distance": distance, "mean": gates.mean()}
                progress({"step": step, **{name: float(x.detach()) for name, x in told.items()}})
    finally:
        for parameter, needed in trained:
            parameter.requires_grad_(needed)
    return gates_plan(model, gates.detach(), method, {"steps": steps, "penalty": penalty, "sinks": sinks, "recent": recent})


@torch.no_grad()
def gate_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Layers and key/value heads of a model, as its attention shows them."""
    heads: list[int] = []
    with reading_session(model, lambda ctx, q, k, v, out: heads.append(k.shape[1])):
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device), use_cache=False)
    if len(set(heads)) != 1:
        raise ValueError(f"the layers of {type(model).__name__} have {sorted(set(heads))} key/value heads: gates need one number")
    return int(model.config.get_text_config(decoder=True).num_hidden_layers), heads[0]


def gates_plan(model: PreTrainedModel, gates: Tensor, method: str = "duoattention", notes: dict[str, Any] | None = None) -> Plan:
    """The plan of gates `(layers, Hk)`: the gates themselves, and where each head stands among all heads."""
    chosen = build(method)
    places = places_of(list(gates.cpu().double()))
    tensors = {f"layer.{i}.gate": own.cpu().float() for i, own in enumerate(gates)}
    tensors |= {f"layer.{i}.place": own for i, own in enumerate(places)}
    facts = {"model": getattr(model.config, "name_or_path", "") or type(model).__name__, **(notes or {})}
    return Plan(slug=chosen.info.slug, spec=chosen.spec, fingerprint=fingerprint(model), tensors=tensors, notes=facts)


def passkeys(
    grammar: Grammar, encode: Callable[[bytes], Sequence[int]], rng: Random, *, prefix: Sequence[int] = (), length: int = 4096,
    count: int = 10, words: int = 32,
) -> Sample:  # fmt: skip
    """One sample of about `length` bytes: `count` facts at random depths of a text, all asked for and answered at its end.

    words: of each value, random ones of the grammar; 0: a value as the grammar draws it. prefix: ids that every sequence begins with.
    """
    noun, facts = rng.choice(NOUNS), {}
    while len(facts) < count:
        facts[grammar.key(rng)] = " ".join(rng.choice(grammar.words) for _ in range(words)) if words else grammar.value(rng)
    pieces = [(rng.random(), needle_sentence(noun, key, value).encode()) for key, value in facts.items()]
    asked = [(needle_question(noun, key), value + needle_close[:-1]) for key, value in rng.sample(list(facts.items()), len(facts))]
    room = length - sum(len(text) for _, text in pieces) - sum(len(question) + len(answer) for question, answer in asked)
    if room < 1:
        raise ValueError(f"{count} facts do not fit into {length} bytes: give a greater length, fewer facts or shorter ones")
    ids = [*prefix, *encode(insert_at_lines(grammar.haystack(rng, room), pieces))]
    predicts = [False] * len(ids)
    for question, answer in asked:
        before, told = list(encode(question.encode())), list(encode(answer.encode()))
        ids += [*before, *told]
        # the hidden state before a token is what predicts it
        predicts += [False] * (len(before) - 1) + [True] * len(told) + [False]
    return torch.tensor([ids]), torch.tensor([predicts])


def next_sample(supply: Any, step: int, steps: int) -> Sample:
    """The next of the samples, checked."""
    found = next(supply, None)
    if found is None:
        raise ValueError(f"the samples ended after {step} of {steps} steps: give one a step")
    ids, answers = found
    if ids.shape != answers.shape or answers.dtype != torch.bool or not bool(answers.any()):
        raise ValueError(
            f"sample {step} has ids {tuple(ids.shape)} and answers {answers.dtype} {tuple(answers.shape)}: "
            "expected a mask of the same shape with some position set"
        )
    return ids, answers


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Last hidden states `(B, N, dim)`, float32."""
    out: Any = model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    return out.hidden_states[-1].float()
