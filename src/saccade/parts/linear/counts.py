"""How many tokens a query reads, as a factor on what it read."""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.core import Call
from saccade.parts.linear.normalise import Normaliser


def tokens_read(call: Call, n: int, bidirectional: bool) -> Tensor:
    """`(B, n)` int64: the tokens so far, each its own among them, or all real tokens of the row for every query."""
    order = torch.arange(1, n + 1, device=call.start.device)
    if not bidirectional:
        return call.start[:, None] + order
    total = torch.full_like(call.start, n) if call.lengths is None else call.lengths
    return total[:, None].expand(-1, n).clamp(min=1)


class CountPower(Normaliser):
    """What the query read times `factor * n^power`, n the tokens it read: power -1 makes a sum a mean."""

    def __init__(self, power: float, factor: float = 1.0, bidirectional: bool = False) -> None:
        super().__init__()
        self.power, self.factor, self.bidirectional = power, factor, bidirectional

    def after(self, out: Tensor, call: Call, level: Tensor | None) -> Tensor:
        wide = torch.promote_types(out.dtype, torch.float32)
        n = tokens_read(call, out.shape[2], self.bidirectional).to(wide)
        return (out.to(wide) * (self.factor * n**self.power)[:, None, :, None]).to(out.dtype)
