"""Running one sample through a model: the prompt at once, then greedy decoding one token at a time, with clocks."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from saccade.attach import Session
from saccade.cache import KVLayer
from saccade.evaluate.prompts import Codec, Prompt
from saccade.evaluate.score import bits_per_byte
from saccade.evaluate.tasks import ANSWER_SLOT, Task

Mode = Literal["aware", "agnostic"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")


@dataclass
class Outcome:
    """One sample's result. Times in ms; `steps` are the single-token forwards in order, the first builds a decode
    index.

    prefill_ms: prompt, compression and question. kv_bytes: held by keys and values once the prompt is compressed.
    """

    score: float
    outputs: list[bytes]
    prefill_ms: float
    kv_bytes: int
    index_bytes: int = 0
    prefill_density: float | None = 1.0
    decode_density: float | None = 1.0
    steps: list[float] = field(default_factory=list)

    @property
    def decode_ms(self) -> float | None:
        """Median time of a step; the first is left out where there are others."""
        steps = self.steps[1:] or self.steps
        return median(steps) if steps else None


class Run:
    """One sequence on a model that may be attached: feeds tokens, keeps the cache, the last logits and the time."""

    def __init__(self, model: PreTrainedModel, session: Session | None) -> None:
        self.model, self.session = model, session
        self.device = next(model.parameters()).device
        self.cache: Cache | None = None
        self.logits: Tensor | None = None
        accepts = inspect.signature(model.forward).parameters
        # logits of the whole prompt are of no use and would dominate the peak memory of a large vocabulary
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}

    def feed(self, ids: list[int]) -> float:
        """Append tokens; returns the time in ms."""
        batch = torch.tensor([ids], device=self.device)
        began = self._now()
        out = self.model(input_ids=batch, past_key_values=self.cache, use_cache=True, **self._options)
        ended = self._now()
        self.cache, self.logits = out.past_key_values, out.logits[0, -1]
        return (ended - began) * 1e3

    def compress(self) -> float:
        """Let a cache policy act on all tokens so far; returns the time in ms."""
        if self.session is None:
            return 0.0
        began = self._now()
        self.session.compress(self.cache)
        return (self._now() - began) * 1e3

    def keep_rest(self) -> None:
        """What was fed after the compression is no second prompt: it stays whole, the policy acts once in a sample."""
        for layer in [] if self.cache is None else self.cache.layers:
            if isinstance(layer, KVLayer):
                layer.pending = 0

    def best(self) -> int:
        """The most likely next token."""
        assert self.logits is not None
        return int(self.logits.argmax())

    def nats(self, token: int) -> float:
        """Negative log-likelihood of `token` as the next one."""
        assert self.logits is not None
        return float(-self.logits.float().log_softmax(-1)[token])

    @property
    def kv_bytes(self) -> int:
        """Bytes of storage behind the keys and values in the cache."""
        if self.session is not None:
            return self.session.stats().kv_bytes
        layers = [] if self.cache is None else self.cache.layers
        # recurrent layers of a hybrid model hold a state and no keys
        named = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        tensors = [x for x in named if isinstance(x, Tensor)]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def run_sample(model: PreTrainedModel, codec: Codec, prompt: Prompt, mode: Mode, session: Session | None) -> Outcome:
    """Run one prompt to its end and score it. `session`: the handle of the `attach` block around this call, or None.

    "aware": context and question are one prompt, compressed at its end. "agnostic": the context alone is compressed,
    the question comes after. What follows the compression (question, answers, followups) is kept whole.
    """
    run = Run(model, session)
    whole = mode == "aware" or not prompt.question
    elapsed = run.feed(prompt.context + prompt.question if whole else prompt.context)
    elapsed += run.compress()
    kv_bytes = run.kv_bytes
    if not whole:
        elapsed += run.feed(prompt.question)
        run.keep_rest()
    outcome = Outcome(0.0, [], elapsed, kv_bytes)
    if prompt.task.unit == "bits":
        outcome.score = _predict(run, codec, prompt.sample.answers[0], outcome)
    else:
        _answer(run, codec, prompt, outcome)
        outcome.score = prompt.task.score(prompt.sample, outcome.outputs)
    if session is not None:
        stats = session.stats()
        outcome.prefill_density, outcome.decode_density = stats.prefill_density, stats.decode_density
        outcome.index_bytes = stats.index_bytes
    return outcome


def _answer(run: Run, codec: Codec, prompt: Prompt, outcome: Outcome) -> None:
    """Greedy answers to the question and to each followup in turn."""
    task, sample = prompt.task, prompt.sample
    for turn in range(1 + len(sample.followups)):
        ids, output = _generate(run, codec, task, task.room(sample, turn), outcome)
        outcome.outputs.append(output)
        if turn < len(sample.followups):
            asked = sample.followups[turn].replace(ANSWER_SLOT, output.strip())
            # the last token of an answer has not been fed yet
            run.feed([*ids[-1:], *codec.encode(asked)])
            run.keep_rest()


def _generate(run: Run, codec: Codec, task: Task, room: int, outcome: Outcome) -> tuple[list[int], bytes]:
    """Ids and text of one greedy output, which ends at a stop of the task, at the end id or after `room` bytes."""
    ids: list[int] = []
    while True:
        token = run.best()
        if token == codec.end:
            return ids, codec.decode(ids)
        ids.append(token)
        text = codec.decode(ids)
        ends = [at for stop in task.stops if (at := text.lstrip().find(stop)) >= 0]
        if ends:
            return ids, text.lstrip()[: min(ends)]
        if len(text) >= room or len(ids) >= room:
            return ids, text
        outcome.steps.append(run.feed([token]))


def _predict(run: Run, codec: Codec, text: bytes, outcome: Outcome) -> float:
    """Bits per byte of `text`, fed one token at a time."""
    nats = 0.0
    ids = codec.encode(text)
    for i, token in enumerate(ids):
        nats += run.nats(token)
        if i + 1 < len(ids):
            outcome.steps.append(run.feed([token]))
    return bits_per_byte(nats, len(text)) if math.isfinite(nats) else math.inf
