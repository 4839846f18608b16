"""How much may be kept: one type for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mass:
    """Keep the smallest set that holds at least this share of the attention mass, `0 < share <= 1`."""

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share <= 1:
            raise ValueError(f"Mass({self.share!r}) is not a share of the attention: give a number above 0 and at most 1")


@dataclass(frozen=True)
class Threshold:
    """Keep everything whose score is above this value (the unit is the method's)."""

    value: float

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float) or math.isnan(self.value):
            raise ValueError(f"Threshold({self.value!r}) is not a number: give the score above which entries are kept")


@dataclass(frozen=True)
class Budget:
    """A share of the tokens (float in (0, 1]), a number of tokens (int >= 1), a Mass or a Threshold.

    `Budget.of` accepts the bare number, which is how method fields are written: `snapkv(budget=0.25)`.
    """

    amount: float | int | Mass | Threshold

    def __post_init__(self) -> None:
        amount = self.amount
        if isinstance(amount, Mass | Threshold):
            return
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            raise TypeError(f"budget {amount!r} is not a ratio, a token count, Mass(...) or Threshold(...)")
        if isinstance(amount, float) and not 0 < amount <= 1:
            raise ValueError(f"budget {amount} is not a ratio above 0 and at most 1: for a number of tokens give an integer")
        if isinstance(amount, int) and amount < 1:
            raise ValueError(f"budget {amount} is not a positive number of tokens: give at least 1, or a ratio such as 0.25")

    @classmethod
    def of(cls, amount: float | int | Mass | Threshold | Budget) -> Budget:
        return amount if isinstance(amount, Budget) else cls(amount)

    def tokens(self, n: int) -> int:
        """How many of `n` tokens may be kept: between 1 and n (0 when n is 0). A ratio rounds up.

        Raises ValueError for Mass and Threshold, whose count depends on scores: use `counts`.
        """
        if isinstance(self.amount, Mass | Threshold):
            raise ValueError(f"{self.amount} has no fixed token count: this method needs a ratio or a number of tokens")
        if n <= 0:
            return 0
        # 0.1 * 70 is 7.000000000000001 in binary: rounding first keeps the ceiling where a reader expects it
        wanted = math.ceil(round(self.amount * n, 9)) if isinstance(self.amount, float) else self.amount
        return max(1, min(wanted, n))

    def counts(self, scores: Tensor, n: int | None = None) -> Tensor:
        """Entries to keep per row of `scores (..., n)`, int64 `(...)`; `-inf` scores are never counted.

        Ratios and token counts: of the `n` entries (default: those above -inf). Mass: the smallest number of highest
        scores (taken as non-negative weights) whose sum is at least the share of the row's total; the entry that crosses the
        target is kept. Threshold: entries above the value.
        """
        there = scores > -torch.inf
        if isinstance(self.amount, Threshold):
            return (scores > self.amount.value).sum(-1)
        available = there.sum(-1)
        if isinstance(self.amount, Mass):
            weights = torch.where(there, scores, 0.0).double().sort(dim=-1, descending=True).values.cumsum(-1)
            total = weights[..., -1:]
            # the last partial sum equals the total, so share 1 keeps every entry that carries weight
            return torch.minimum((weights < self.amount.share * total).sum(-1) + 1, available)
        if n is not None:
            return available.clamp(max=self.tokens(n))
        if isinstance(self.amount, int):
            return available.clamp(max=self.amount)
        exact = (available.double() * self.amount * 1e9).round() / 1e9
        return torch.minimum(exact.ceil().long().clamp(min=1), available)

    def __str__(self) -> str:
        if isinstance(self.amount, Mass):
            return f"Mass({self.amount.share})"
        return f"Threshold({self.amount.value})" if isinstance(self.amount, Threshold) else str(self.amount)
