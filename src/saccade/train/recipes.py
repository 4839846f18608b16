"""Plans of methods whose parts are trained, from text alone: what `saccade calibrate` runs for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random

import torch
from transformers import PreTrainedModel

from saccade.core import Method, Plan
from saccade.train.attention_gates import train_attention_gates
from saccade.train.gates import Sample, passkeys, train_gates
from saccade.train.text import Grammar

RECIPES = ("duoattention", "attention-gate")
STEPS = 100  # unless told otherwise
FACT = 160  # bytes of text for each fact that is hidden in it and asked for
MOST_FACTS = 10
RATE = 0.05  # of the gates of duoattention: with a hundred steps they have to move faster than with the paper's 2000


def train_plan(
    model: PreTrainedModel, method: Method, grammar: Grammar, encode: Callable[[bytes], Sequence[int]], *, prefix: Sequence[int] = (),
    length: int = 2048, steps: int = STEPS, seed: int = 0, progress: Callable[[int], None] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a method in RECIPES, trained on `steps` texts of about `length` tokens with facts that are asked for at their end.

    encode: bytes to token ids; prefix: ids that every sequence begins with. progress gets the number of steps done. The result depends
    on the seed and the text alone. ValueError for a method without a recipe and a length that holds no fact.
    """
    slug = method.info.slug
    if slug not in RECIPES:
        raise ValueError(f"{slug} has no trained parts: choose one of {', '.join(RECIPES)}")
    per_token = 4096 / max(1, len(encode(grammar.text[:4096]))) if len(grammar.text) >= 4096 else 1.0
    n_bytes = int((length - len(prefix)) * per_token)
    count = min(MOST_FACTS, n_bytes // FACT - 1)
    if count < 1:
        raise ValueError(f"a text of {length} tokens holds no fact and its question: give at least {int(2 * FACT / per_token) + 1}")
    rng = Random(seed)

    def samples() -> Iterator[Sample]:
        while True:
            ids, answers = passkeys(grammar, encode, rng, prefix=prefix, length=n_bytes, count=count, words=0)
            # the gates of attention-gate learn from the text as a whole
            yield ids, answers if slug == "duoattention" else torch.ones_like(answers)

    def told(facts: dict[str, float]) -> None:
        if progress is not None:
            progress(int(facts["step"]) + 1)

    if slug == "duoattention":
        sinks, recent = getattr(method, "sinks", 64), getattr(method, "recent", 256)
        return train_gates(model, samples(), steps=steps, method=method.spec, rate=RATE, sinks=sinks, recent=recent, progress=told)
    return train_attention_gates(model, samples(), steps=steps, method=method.spec, seed=seed, progress=told)
