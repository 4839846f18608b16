"""What a training set is: seeded batches of tokens with a target for every token, and a measure of what was learnt."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the target of a token without a loss
Stream = Literal["train", "evaluate"]
Batch = tuple[Tensor, Tensor]


class TokenSet(ABC):
    """A source of `(tokens, targets)`, both int64 `(B, N)`; `targets[b, i]` is what the model should say after `tokens[b, : i + 1]`.

    Targets are not shifted once more by who trains on them. IGNORE marks tokens without a loss. A set is a frozen dataclass whose
    fields are its arguments in a recipe; what it draws depends on the generator or seed it is given and on nothing else.
    """

    name: ClassVar[str]

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Token ids and targets are below this number."""

    @property
    @abstractmethod
    def context(self) -> int:
        """N, the tokens of a sequence."""

    @abstractmethod
    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        """`batch` sequences drawn with a CPU generator."""

    def rows(self, seed: int, stream: Stream, number: int, batch: int, first: int, last: int) -> Batch:
        """Rows `first` to `last` (not included) of batch `number` of a stream, the same however the rows are shared out."""
        tokens, targets = self.sample(seeded(seed, self.name, stream, number), batch)
        return tokens[first:last], targets[first:last]

    def score(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Measures as `(sum, count)`, to be added up over batches: here "accuracy", the share of targets that rank first.

        logits: `(B, N, V)` with V at least `vocabulary`; tokens, targets: as `sample` gives them.
        """
        asked = targets != IGNORE
        return {"accuracy": (((logits.argmax(-1) == targets) & asked).sum(), asked.sum())}

    def fingerprint(self) -> str:
        """Names what the set reads from outside, so that a run is not resumed on other data; "" where it reads nothing."""
        return ""

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of the token ids, None where they stand for nothing outside the set."""
        return None


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed from anything that prints, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seeded(*parts: Any) -> torch.Generator:
    """A CPU generator that `parts` decide."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def distinct(generator: torch.Generator, rows: int, population: int, count: int) -> Tensor:
    """`(rows, count)` int64: in each row different numbers below `population`, in random order."""
    return torch.rand(rows, population, generator=generator).topk(count, dim=-1).indices


def require(holds: bool, sentence: str) -> None:
    """Raise ValueError with the sentence unless the condition holds."""
    if not holds:
        raise ValueError(sentence)
