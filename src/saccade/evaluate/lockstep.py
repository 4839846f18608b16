"""Many prompts of one task at once: a batch goes through the model together, and its right answers are fed to it.

An answer counts as right when every token of it, and an end after it, was the most likely one while the right tokens before it were fed:
that is what greedy decoding would have written. Rows of a batch so stay equally long, which saves most of the time of small models.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from saccade.attach import Session
from saccade.cache import KVLayer
from saccade.evaluate.decoding import Mode
from saccade.evaluate.prompts import Codec, Prompt, prompt_of
from saccade.evaluate.score import bits_per_byte
from saccade.evaluate.tasks import Task, build, spec_of
from saccade.train.text import Grammar

TASKS = ("needle", "needle-multikey", "needle-multiquery", "needle-multivalue", "dictionary", "variables", "text")
LEAST_STEPS = 3  # that are timed even where no answer can be right any more
FILLER = b"\n"


@dataclass
class Together:
    """What a batch gave. scores: of each prompt, by turn. Bytes are a row's share. Times in ms are of the whole batch: prefill_ms with
    compression and question, steps of single tokens."""

    scores: list[list[float]]
    prefill_ms: float
    kv_bytes: int
    index_bytes: int = 0
    host_bytes: int = 0
    prefill_density: float | None = 1.0
    decode_density: float | None = 1.0
    steps: list[float] = field(default_factory=list)

    @property
    def decode_ms(self) -> float | None:
        """Median time of a step, the first one left out where there are others."""
        steps = self.steps[1:] or self.steps
        return median(steps) if steps else None


def check_task(task: str | Task) -> Task:
    """The task; ValueError where right answers can't be fed, because outputs are scored by more than exact match."""
    found = build(task)
    if found.name not in TASKS:
        raise ValueError(f"task {found.name} is not scored by exact match: tables take {', '.join(TASKS)}")
    return found


def aligned_prompts(task: Task, codec: Codec, grammar: Grammar, *, length: int, seed: int, samples: int) -> list[Prompt]:
    """Prompts of `length` tokens whose questions are equally long, so that they fit one batch: blank lines come before short ones.

    They depend on seed, task, length and index alone. With a tokenizer that does not map bytes to ids one by one they are those of
    `prompt_of`, which fit several smaller batches.
    """
    room = length - len(codec.prefix)
    drawn = [task.at(i).make(Random(f"{seed}/{spec_of(task)}/{length}/{i}"), grammar, max(room, task.minimum)) for i in range(samples)]
    if any(len(codec.encode(one.context)) != len(one.context) for one in drawn):
        return [prompt_of(task, codec, grammar, length=length, seed=seed, index=i) for i in range(samples)]
    if room < task.minimum:
        raise ValueError(f"length {length} is below the minimum of task {task.name}, {task.minimum + len(codec.prefix)}: ask for more")
    widest = max(len(one.question) for one in drawn)
    prompts = []
    for i, one in enumerate(drawn):
        blank = widest - len(one.question)
        if room - blank >= task.minimum:
            # the facts are drawn before the text around them, which alone becomes shorter
            one = task.at(i).make(Random(f"{seed}/{spec_of(task)}/{length}/{i}"), grammar, room - blank)
        question = codec.encode(FILLER * (widest - len(one.question)) + one.question)
        prompts.append(Prompt(task, one, codec.prefix + codec.encode(one.context), question))
    return prompts


def batches(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """The prompts in groups that are equally long, context and question each."""
    groups: dict[tuple[int, int], list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault((len(prompt.context), len(prompt.question)), []).append(prompt)
    return list(groups.values())


class Rows:
    """Equally long sequences on a model that may be attached."""

    def __init__(self, model: PreTrainedModel, session: Session | None) -> None:
        self.model, self.session = model, session
        self.device = next(model.parameters()).device
        self.cache: Cache | None = None
        self._limited = "logits_to_keep" in inspect.signature(model.forward).parameters

    def feed(self, ids: list[list[int]], keep: int = 1) -> tuple[Tensor, float]:
        """Append tokens to every row; float32 log-probabilities after the last `keep` of them, `(B, keep, vocabulary)`, and ms."""
        batch = torch.tensor(ids, device=self.device)
        options: dict[str, Any] = {"logits_to_keep": keep} if self._limited else {}
        began = self._now()
        out = self.model(input_ids=batch, past_key_values=self.cache, use_cache=True, **options)
        ended = self._now()
        self.cache = out.past_key_values
        return out.logits[:, -keep:].float().log_softmax(-1), (ended - began) * 1e3

    def compress(self) -> float:
        if self.session is None:
            return 0.0
        began = self._now()
        self.session.compress(self.cache)
        return (self._now() - began) * 1e3

    def keep_rest(self) -> None:
        """What follows the compression is no second prompt."""
        for layer in [] if self.cache is None else self.cache.layers:
            if isinstance(layer, KVLayer):
                layer.pending = 0

    @property
    def kv_bytes(self) -> int:
        if self.session is not None:
            return self.session.stats().kv_bytes
        layers = [] if self.cache is None else self.cache.layers
        named = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        return sum(x.untyped_storage().nbytes() for x in named if isinstance(x, Tensor))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def run_together(
    model: PreTrainedModel, codec: Codec, prompts: Sequence[Prompt], mode: Mode, session: Session | None, *, step: int = 1
) -> Together:
    """Run one batch (see `batches`) and score it. step: tokens of an answer that are fed at once, 1 to 16; up to 16 count as decoding.

    "aware": context and question are one prompt, compressed at its end; "agnostic": the context alone. What follows is kept whole.
    """
    rows, task = Rows(model, session), prompts[0].task
    whole = mode == "aware" or not prompts[0].question
    logits, elapsed = rows.feed([p.context + p.question if whole else p.context for p in prompts])
    elapsed += rows.compress()
    kv_bytes = rows.kv_bytes
    if not whole:
        logits, took = rows.feed([p.question for p in prompts])
        elapsed += took
    rows.keep_rest()
    found = Together([[] for _ in prompts], elapsed, kv_bytes // len(prompts))
    turns = 1 if task.unit == "bits" else 1 + len(prompts[0].sample.followups)
    fed = [0] * len(prompts)
    for turn in range(turns):
        answers = [codec.encode(p.sample.answers[turn]) for p in prompts]
        if turn:
            logits, _ = rows.feed(_asked(codec, prompts, turn, fed))
            rows.keep_rest()
        longest = max(map(len, answers))
        filled = [_filled(codec, task, answer, longest) for answer in answers]
        scores, fed = _read(rows, codec, task, answers, filled, logits, step, found, last=turn == turns - 1)
        for row, score in zip(found.scores, scores, strict=True):
            row.append(score)
    if session is not None:
        stats = session.stats()
        found.prefill_density, found.decode_density = stats.prefill_density, stats.decode_density
        found.index_bytes, found.host_bytes = (n // len(prompts) for n in (stats.index_bytes, stats.host_bytes))
    return found


def _filled(codec: Codec, task: Task, answer: list[int], n: int) -> list[int]:
    """n tokens: the answer, what ends it, and blank lines."""
    end = codec.encode(task.stops[0]) if task.stops and len(answer) < n else []
    return [*answer, *end, *codec.encode(FILLER) * n][:n]


def _asked(codec: Codec, prompts: Sequence[Prompt], turn: int, fed: list[int]) -> list[list[int]]:
    """The next question of every row, equally long: what is left of the answer's end, blank lines, the question."""
    rest = []
    for prompt, n in zip(prompts, fed, strict=True):
        answer = codec.encode(prompt.sample.answers[turn - 1])
        end = codec.encode(prompt.task.stops[0]) if n <= len(answer) else []
        rest.append((answer[n:] + end, codec.encode(prompt.sample.followups[turn - 1])))
    longest = max(len(end) + len(question) for end, question in rest)
    blank = codec.encode(FILLER)
    return [[*end, *blank * (longest - len(end) - len(question)), *question] for end, question in rest]


def _read(
    rows: Rows, codec: Codec, task: Task, answers: list[list[int]], filled: list[list[int]], logits: Tensor, step: int, found: Together,
    *, last: bool,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """Feed the answers `step` tokens at a time: each row's score, and how many tokens of it were fed."""
    bits = task.unit == "bits"
    nats, alive, at = [0.0] * len(answers), [True] * len(answers), 0
    longest = len(filled[0])
    while True:
        n = logits.shape[1]
        best = logits.argmax(-1).tolist()
        if bits:
            wanted = torch.tensor([row[at : at + n] for row in filled], device=logits.device)
            gained = logits[:, : wanted.shape[1]].gather(-1, wanted.unsqueeze(-1)).squeeze(-1).tolist()
            # rows that were over before the longest are filled up with what nobody asked for
            nats = [x - sum(row[: max(0, len(answer) - at)]) for x, row, answer in zip(nats, gained, answers, strict=True)]
        else:
            for row, answer in enumerate(answers):
                for j, token in enumerate(best[row]):
                    place = at + j
                    right = token == answer[place] if place < len(answer) else place > len(answer) or _ends(codec, token)
                    alive[row] = alive[row] and right
        at += n
        # `at` tokens are predicted, at - 1 fed; of text the last one need not be fed
        hopeless = not bits and last and not any(alive) and len(found.steps) >= LEAST_STEPS
        if at > longest or (bits and at >= longest) or hopeless:
            break
        size = min(step, longest - (at - 1))
        logits, took = rows.feed([row[at - 1 : at - 1 + size] for row in filled], size)
        found.steps.append(took / size)
    scores = [
        (bits_per_byte(x, len(codec.decode(answer))) if math.isfinite(x) else math.inf) if bits else float(ok)
        for x, ok, answer in zip(nats, alive, answers, strict=True)
    ]
    return scores, [at - 1] * len(answers)


def _ends(codec: Codec, token: int) -> bool:
    """Whether an answer is over when this token follows it."""
    if token == codec.end:
        return True
    text = codec.decode([token])
    return not (text[:1].isalnum() or text[:1] == b"_")
