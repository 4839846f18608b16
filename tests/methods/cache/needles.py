"""Needle prompts for the pocket model, several of one length at once."""

from __future__ import annotations

from functools import cache
from random import Random

import torch
from transformers import LlamaForCausalLM

import saccade
from saccade.core import Method
from saccade.evaluate.tasks.needle import Needle
from saccade.evaluate.text import grammar, shipped_text

BYTE = 3  # the id of byte 0


@cache
def pocket() -> LlamaForCausalLM:
    return saccade.pocket(dtype=torch.float32, device="cpu")[0]


def prompts(length: int, depths: tuple[float, ...], seed: int = 0) -> tuple[torch.Tensor, list[bytes]]:
    """Token ids `(len(depths), length + 1)`, a needle at each depth, and the answers."""
    samples = [Needle(depths=(depth,)).make(Random(seed + i), grammar(), length) for i, depth in enumerate(depths)]
    ids = torch.tensor([[1, *(byte + BYTE for byte in s.context + s.question)] for s in samples])
    return ids, [s.answers[0] for s in samples]


def found(ids: torch.Tensor, answers: list[bytes], method: str | Method | None, when: str = "prompt") -> list[bool]:
    """Whether each row's greedy continuation is its answer, with the method as cache policy."""
    model, longest = pocket(), max(map(len, answers)) + 1
    with saccade.attach(model, cache=method, when=when):
        out = model.generate(ids, max_new_tokens=longest, do_sample=False, pad_token_id=0, eos_token_id=2)
    texts = [bytes(max(0, token - BYTE) for token in row) for row in out[:, ids.shape[1] :].tolist()]
    return [text.startswith(answer + b".") for text, answer in zip(texts, answers, strict=True)]


def streams(rows: int, n: int, seed: int = 0) -> torch.Tensor:
    """Token ids `(rows, n + 1)` of text that the pocket model was not trained on."""
    rng, text = Random(seed), shipped_text()
    starts = [rng.randrange(len(text) - n) for _ in range(rows)]
    return torch.tensor([[1, *(byte + BYTE for byte in text[s : s + n])] for s in starts])
