"""Byte text from any folder: its files as one text, cut into windows that are shuffled anew in every epoch.

A window's place in the stream follows from the seed and its number alone, so a run can stop anywhere and any number of processes can
share a batch: each reads the windows of its own rows.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.pocket.tokenizer import BOS, BYTE_OFFSET, VOCABULARY, build_tokenizer
from saccade.train.sets.base import IGNORE, Batch, Stream, TokenSet, require, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@cache
def _read(folder: Path, endings: tuple[str, ...]) -> Tensor:
    """uint8 `(n,)`: the files below `folder` in the order of their paths, hidden ones left out, a line break after each."""
    paths = sorted(
        (path.relative_to(folder).as_posix(), path)
        for path in folder.rglob("*")
        if path.is_file() and (not endings or path.suffix in endings)
    )
    parts = [path.read_bytes() for name, path in paths if not any(part.startswith(".") for part in name.split("/"))]
    return torch.frombuffer(bytearray(b"\n".join(part for part in parts if part) or b"\n"), dtype=torch.uint8)


@cache
def _digest(folder: Path, endings: tuple[str, ...]) -> str:
    return hashlib.sha256(_read(folder, endings).numpy().tobytes()).hexdigest()[:16]


@cache
def _order(seed: int, epoch: int, windows: int) -> Tensor:
    return torch.randperm(windows, generator=seeded(seed, "windows", epoch))


@dataclass(frozen=True, kw_only=True)
class ByteText(TokenSet):
    """folder: all files below it are read, hidden ones left out. length: bytes of a window; a sequence is a bos token and all its bytes
    but the last, its targets are the bytes. endings: if given, only files with these endings (".py") are read. held_out: share of the
    windows, from the end of the text, that is kept for evaluation.
    """

    name: ClassVar[str] = "bytes"

    folder: Path
    length: int = 512
    endings: tuple[str, ...] = ()
    held_out: float = 0.02

    def __post_init__(self) -> None:
        require(self.folder.is_dir(), f"the folder {self.folder} does not exist: give one with text files")
        require(self.length >= 2, f"length is {self.length}, expected at least 2 bytes")
        require(0 < self.held_out < 1, f"held_out is {self.held_out}, expected a share between 0 and 1")
        require(
            self.windows >= 2, f"{self.folder} holds {len(self.text)} bytes to read, expected at least two windows of {self.length}"
        )

    @property
    def text(self) -> Tensor:
        """uint8 `(n,)`: all that was read."""
        return _read(self.folder, self.endings)

    @property
    def windows(self) -> int:
        """All windows, held-out ones included; a rest shorter than a window is left out."""
        return len(self.text) // self.length

    @property
    def training_windows(self) -> int:
        """The first so many windows are trained on, the others evaluate."""
        return self.windows - min(self.windows - 1, max(1, round(self.held_out * self.windows)))

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @property
    def context(self) -> int:
        return self.length

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return build_tokenizer()

    def fingerprint(self) -> str:
        return _digest(self.folder, self.endings)

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        return self._cut(torch.randint(self.training_windows, (batch,), generator=generator))

    def rows(self, seed: int, stream: Stream, number: int, batch: int, first: int, last: int) -> Batch:
        places = range(number * batch + first, number * batch + last)
        n = self.training_windows
        if stream == "evaluate":
            return self._cut(torch.tensor([n + place % (self.windows - n) for place in places]))
        return self._cut(torch.stack([_order(seed, place // n, n)[place % n] for place in places]))

    def score(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """ "accuracy", and "bits" per byte."""
        asked = (targets != IGNORE).sum()
        nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return super().score(logits, tokens, targets) | {"bits": (nats / math.log(2), asked)}

    def _cut(self, numbers: Tensor) -> Batch:
        spots = numbers[:, None] * self.length + torch.arange(self.length)
        targets = self.text[spots].long() + BYTE_OFFSET
        tokens = targets.roll(1, -1)
        tokens[:, 0] = BOS
        return tokens, targets
