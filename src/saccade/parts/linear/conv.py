"""Short causal convolutions: each channel sees its last few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.ops.conv import Impl, short_conv
from saccade.parts.linear.tokens import last_tokens


class ShortConv(nn.Module):
    """Depthwise causal convolution over tokens: `y_t = act(sum_j w_j x_{t - width + 1 + j} + b)`, with zeros before the first token.

    channels: of x. width: tokens read, the current one among them. activation: "silu" or None. impl: of `saccade.ops.conv.short_conv`.
    """

    def __init__(self, channels: int, width: int = 4, activation: str | None = "silu", bias: bool = False) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a convolution of width {width} reads nothing: give at least 1")
        if activation not in (None, "silu"):
            raise ValueError(f"activation {activation!r} of a short convolution is not known: use 'silu' or None")
        self.width, self.activation = width, activation
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.impl: Impl = "auto"

    def forward(self, x: Tensor, tail: Tensor | None = None, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(y, the new tail): x `(B, N, C)`, tail `(B, width - 1, C)` the inputs before (None: zeros), lengths as in `last_tokens`."""
        return self._run(x, self.weight, self.bias, tail, lengths)

    def each(self, xs: Sequence[Tensor], tail: Tensor | None = None, lengths: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """The same of several x, whose channels one after the other are those of the convolution; the tail is one for all. Sequences are
        not put together for it, single tokens are: fewer operations are quicker there."""
        widths = [x.shape[2] for x in xs]
        if xs[0].shape[1] == 1:
            y, after = self(torch.cat(list(xs), dim=-1), tail, lengths)
            return list(y.split(widths, dim=-1)), after
        biases, tails = (
            [None] * len(xs) if given is None else given.split(widths, axis) for given, axis in ((self.bias, 0), (tail, -1))
        )
        found = [self._run(*own, lengths) for own in zip(xs, self.weight.split(widths), biases, tails, strict=True)]
        return [y for y, _ in found], torch.cat([after for _, after in found], dim=-1)

    def _run(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        tail = None if tail is None else tail.to(x.dtype)
        y = short_conv(x, weight, bias, tail=tail, activation=self.activation, impl=self.impl)
        before = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if tail is None else tail
        return y, last_tokens(before, x, lengths)
