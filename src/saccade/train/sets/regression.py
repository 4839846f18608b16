"""In-context regression: each sequence hides a linear map, shows points with their values, and asks for the next value.

The task of Garg et al. (arXiv 2208.01066) in a form for token models: every number is one token, the bin it falls into, and the answer
is a distribution over bins, so nothing but tokens goes in or out. Errors are measured on the mean of that distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saccade.train.sets.base import IGNORE, Batch, TokenSet, require

REACH = 3.0  # bins cover this many standard deviations on both sides; what lies beyond falls into the outermost


@dataclass(frozen=True, kw_only=True)
class Regression(TokenSet):
    """dims: d, numbers of a point x, standard normal. points: points of a sequence. bins: tokens for a coordinate, and as many others
    for a value y = w.x / sqrt(d) + noise, with w standard normal and fixed within the sequence.

    A sequence is x_1 (d tokens), y_1, x_2, ..., y_points; the loss is on every y. x enters the product as its bin's centre, so that all
    noise is in `noise`.
    """

    name: ClassVar[str] = "regression"

    dims: int = 4
    points: int = 32
    bins: int = 32
    noise: float = 0.0

    def __post_init__(self) -> None:
        require(self.dims >= 1 and self.points >= 2, f"dims {self.dims} and points {self.points} were given, expected at least 1 and 2")
        require(self.bins >= 2, f"bins is {self.bins}, expected at least 2")
        require(self.noise >= 0, f"noise is {self.noise}, expected no negative number")

    @property
    def vocabulary(self) -> int:
        return 2 * self.bins

    @property
    def context(self) -> int:
        return self.points * (self.dims + 1) - 1  # after the last value nothing is asked

    def sample(self, generator: torch.Generator, batch: int) -> Batch:
        x = self._bin(torch.randn(batch, self.points, self.dims, generator=generator))
        w = torch.randn(batch, self.dims, 1, generator=generator)
        y = (self.centres()[x] @ w).squeeze(-1) / self.dims**0.5
        y = y + self.noise * torch.randn(batch, self.points, generator=generator)
        values = self.bins + self._bin(y)
        tokens = torch.cat([x, values[..., None]], -1).flatten(1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, self.dims - 1 :: self.dims + 1] = values
        return tokens[:, :-1].contiguous(), targets[:, :-1].contiguous()

    def centres(self) -> Tensor:
        """float32 `(bins,)`: the number that each bin stands for."""
        width = 2 * REACH / self.bins
        return torch.arange(self.bins) * width - REACH + width / 2

    def score(self, logits: Tensor, tokens: Tensor, targets: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """ "accuracy" (the very bin), and squared errors relative to the mean square of the values: "error" of the model's mean, and
        "least squares", that of the exact solution from the same points. 1 is as good as always saying zero. Both are taken after the
        first `dims` points, from where on the map is known.
        """
        out = super().score(logits, tokens, targets)
        at = slice(self.dims - 1 + self.dims * (self.dims + 1), None, self.dims + 1)
        centres = self.centres().to(logits.device)
        said = logits[:, at, self.bins : 2 * self.bins].float().softmax(-1) @ centres
        asked = targets[:, at]
        y = centres[asked - self.bins]
        square = y.square().sum()
        solved = self._least_squares(tokens, targets)
        return out | {"error": ((said - y).square().sum(), square), "least squares": ((solved - y).square().sum(), square)}

    def _least_squares(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`(B, points - dims)`: the value of each later point by the map of least squared error (and norm) through those before it."""
        d, centres = self.dims, self.centres().double()
        grid = torch.cat([tokens, targets[:, -1:]], 1).cpu().unflatten(1, (self.points, d + 1))
        x, y = centres[grid[..., :d]], centres[grid[..., d] - self.bins]
        found = []
        for i in range(d, self.points):
            w = torch.linalg.lstsq(x[:, :i], y[:, :i, None], driver="gelsd").solution
            found.append((x[:, i : i + 1] @ w).flatten())
        return torch.stack(found, 1).float().to(tokens.device)

    def _bin(self, x: Tensor) -> Tensor:
        return ((x + REACH) / (2 * REACH) * self.bins).floor().long().clamp(0, self.bins - 1)
