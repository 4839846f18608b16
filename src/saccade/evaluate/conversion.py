"""What a conversion costs and saves: a model before and after, on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saccade.cache.state_layer import StateLayer
from saccade.evaluate.decoding import Run, run_sample
from saccade.evaluate.prompts import Codec, prompt_of
from saccade.evaluate.score import bits_per_byte
from saccade.evaluate.tasks import Needle
from saccade.evaluate.text import grammar
from saccade.train.exams import needles
from saccade.train.extend import Batches, next_token_loss
from saccade.train.layer_choice import Measure
from saccade.train.text import Grammar

STEPS = 17  # tokens that are timed; the first is left out
CHOICE_FROM = 100_000  # number of the first needle that layers are chosen by


@dataclass(frozen=True, kw_only=True)
class Measured:
    """bits: per byte of held-out text. needle: share of the facts that are found. state_bytes: held for one sequence of `length` tokens,
    spare room included. decode_ms: median time of a token behind it."""

    bits: float
    needle: float
    state_bytes: int
    decode_ms: float


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: Any, *, length: int, samples: int = 8, seed: int = 0) -> Measured:
    """`model` on texts and needles of `length` tokens, which depend on the tokenizer, the length and the seed alone."""
    codec, device = Codec(tokenizer), next(model.parameters()).device
    nats, size = 0.0, 0
    for index in range(samples):
        text = grammar().haystack(Random(f"{seed}/text/{index}"), length)
        ids = [*codec.prefix, *codec.encode(text)]
        nats += float(next_token_loss(model, torch.tensor([ids], device=device)).double().sum())
        size += len(text)
    prompts = [prompt_of(Needle(), codec, grammar(), length=length, seed=seed, index=index) for index in range(samples)]
    found = [run_sample(model, codec, prompt, "aware", None).score for prompt in prompts]
    run = Run(model, None)
    run.feed((prompts[0].context + prompts[0].question)[:length])
    held = [layer.state.nbytes for layer in getattr(run.cache, "layers", []) if isinstance(layer, StateLayer) and layer.state is not None]
    state_bytes = sum(held) if held else run.kv_bytes
    steps = [run.feed([run.best()]) for _ in range(STEPS)]
    return Measured(bits=bits_per_byte(nats, size), needle=sum(found) / samples, state_bytes=state_bytes, decode_ms=median(steps[1:]))


def judge(tokenizer: Any, *, length: int, samples: int = 8, seed: int = 0) -> Measure:
    """What `saccade.train.layer_choice` measures a model by, on needles and texts of `length` tokens: the mean probability of the right
    token, over the needles' answers (recall) and over the texts (common sense). Others than those that `measure` scores."""
    codec = Codec(tokenizer)
    texts = [[*codec.prefix, *codec.encode(grammar().haystack(Random(f"{seed}/choice/{index}"), length))] for index in range(samples)]
    asked: list[tuple[list[int], int]] = []
    for index in range(samples):
        prompt = prompt_of(Needle(), codec, grammar(), length=length, seed=seed, index=CHOICE_FROM + index)
        answer = codec.encode(prompt.sample.answers[0])
        asked.append(([*prompt.context, *prompt.question, *answer], len(answer)))

    @torch.no_grad()
    def right(model: PreTrainedModel, ids: list[int]) -> Tensor:
        return (-next_token_loss(model, torch.tensor([ids], device=next(model.parameters()).device))[0].double()).exp()

    def found(model: PreTrainedModel) -> tuple[float, float]:
        recall = torch.cat([right(model, ids)[-n:] for ids, n in asked])
        common = torch.cat([right(model, ids) for ids in texts])
        return float(recall.mean()), float(common.mean())

    return found


def lessons(tokenizer: Any, text: bytes, words: list[str], context: int, seed: int = 0) -> Batches:
    """Batches of `context` tokens that a conversion trains on: in turn excerpts of `text` and needles in such excerpts, all with the
    special tokens in front that the tokenizer begins with. ValueError when the text is too short."""
    codec, source = Codec(tokenizer), Grammar(text, words)
    if len(text) < 16 * context:
        raise ValueError(f"the text has {len(text)} bytes, too few for sequences of {context} tokens: give at least {16 * context}")

    def one(rng: Random, drill: bool) -> list[int]:
        room = context
        while True:
            parts = needles(source, rng, room, count=2, questions=2) if drill else ()
            data = b"".join(p.text for p in parts) if drill else source.haystack(rng, room)
            ids = [*codec.prefix, *codec.encode(data)]
            if len(ids) >= context:
                # the questions stand at the end
                return [*codec.prefix, *ids[len(ids) - context + len(codec.prefix) :]]
            room *= 2

    def batch(step: int, rows: int) -> Tensor:
        rng = Random(f"{seed}/{step}")
        return torch.tensor([one(rng, row % 2 == 1) for row in range(rows)])

    return batch
