"""From a task's bytes to the tokens of a model: prompts of exactly the asked length, whatever the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

from saccade.evaluate.tasks import Sample, Task, spec_of
from saccade.train.text import Grammar

DRAWS = 8  # states of the generator tried for a prompt of exactly the asked length


@dataclass(frozen=True)
class Codec:
    """A tokenizer seen as a map between bytes and ids. Text is UTF-8; a character cut in two at an edge is dropped."""

    tokenizer: Any

    def encode(self, data: bytes) -> list[int]:
        """Ids of `data`, without special tokens."""
        if not data:
            return []
        text = data.decode("utf-8", errors="ignore")
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: list[int]) -> bytes:
        """The text of `ids` as bytes, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8")

    @cached_property
    def prefix(self) -> list[int]:
        """The special tokens that every sequence of this tokenizer begins with."""
        plain, whole = self.encode(b"a"), list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start]
        begin = self.tokenizer.bos_token_id
        return [] if begin is None else [begin]

    @property
    def end(self) -> int | None:
        """The id that ends a sequence, if there is one."""
        return self.tokenizer.eos_token_id


@dataclass(frozen=True)
class Prompt:
    """A sample in tokens. `context` begins with the tokenizer's prefix; `context` and `question` make the prompt."""

    task: Task
    sample: Sample
    context: list[int]
    question: list[int]

    @property
    def length(self) -> int:
        """Tokens of the prompt, the prefix included."""
        return len(self.context) + len(self.question)


def prompt_of(task: Task, codec: Codec, grammar: Grammar, *, length: int, seed: int, index: int) -> Prompt:
    """Sample `index` of a task with a prompt of `length` tokens (prefix, context and question; followups come on top).

    Depends on seed, task, length, index, text and tokenizer only. Where no draw gives exactly `length` tokens the prompt
    is the nearest shorter one. Raises ValueError when `length` is below the task's minimum.
    """
    best: Prompt | None = None
    for draw in range(DRAWS):
        key = f"{seed}/{spec_of(task)}/{length}/{index}" + (f"/{draw}" if draw else "")
        found = _fit(task, task.at(index), codec, grammar, length, key)
        if best is None or found.length > best.length:
            best = found
        if best.length == length:
            break
    assert best is not None
    return best


def _fit(task: Task, variant: Task, codec: Codec, grammar: Grammar, length: int, key: str) -> Prompt:
    """The longest prompt of at most `length` tokens that one state of the generator gives, found by bisection."""

    def build(n_bytes: int) -> Prompt:
        sample = variant.make(Random(key), grammar, n_bytes)
        return Prompt(task, sample, codec.prefix + codec.encode(sample.context), codec.encode(sample.question))

    guess = length - len(codec.prefix)  # exact for byte tokenizers
    if guess >= task.minimum:
        prompt = build(guess)
        if prompt.length == length:
            return prompt
    low = task.minimum
    prompt = build(low)
    if prompt.length > length:
        raise ValueError(_too_short(task, length, prompt.length))
    high, above = low, prompt
    while above.length <= length:
        low, prompt = high, above
        # aim a tenth past the target, at the number of bytes a token has had so far
        high = max(high + 64, int(1.1 * high * length / above.length))
        above = build(high)
    while high - low > 1 and prompt.length != length:
        middle = (low + high) // 2
        found = build(middle)
        if found.length <= length:
            low, prompt = middle, found
        else:
            high = middle
    return prompt


def check_length(task: Task, codec: Codec, grammar: Grammar, length: int) -> None:
    """Raise ValueError when prompts of `length` tokens are too short for a task (and its text, for very long ones)."""
    smallest = task.minimum + len(codec.prefix)
    if length < smallest:
        # other tokenizers than byte ones need fewer tokens than bytes
        sample = task.make(Random(0), grammar, task.minimum)
        needed = len(codec.prefix) + len(codec.encode(sample.context)) + len(codec.encode(sample.question))
        if length < needed:
            raise ValueError(_too_short(task, length, needed))


def _too_short(task: Task, length: int, needed: int) -> str:
    return f"length {length} is below the minimum of task {task.name}, {needed} tokens with this tokenizer: ask for a greater one"
