"""Attention in a sliding window with a distance bias and softmax or sigmoid weights, a chunk of rows at a time.

    l_mn = cap(scale q_m.k_n) + a_h (m - n),    n <= m < n + w
    sigmoid:  o_m = sum_n sigmoid(l_mn) v_n          softmax:  o_m = sum_n exp(l_mn) v_n / sum_n exp(l_mn)

Sigmoid weights have no denominator: outputs over disjoint keys add up. Autograd gives the backward pass, dS = dP p (1 - p).
Source: swat, arXiv 2502.18845, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

ROWS = 256  # most rows of a chunk: all of them read the keys that any of them reads
FEWEST = 32


class Chunk(NamedTuple):
    """Rows begin ... end - 1 (positions) over the keys first ... end - 1."""

    begin: int
    end: int
    first: int

    @property
    def pairs(self) -> int:
        """Pairs with the key not after the query: what is computed for the rows."""
        rows = self.end - self.begin
        return rows * (self.end - self.first) - rows * (rows - 1) // 2


def chunks(n_q: int, n_k: int, window: int) -> Iterator[Chunk]:
    """The last n_q of n_k positions, cut so that a chunk has about as many rows as its window."""
    rows = max(FEWEST, min(ROWS, window))
    for begin in range(n_k - n_q, n_k, rows):
        yield Chunk(begin, min(begin + rows, n_k), max(0, begin - window + 1))


def banded_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, softcap: float | None, slopes: Tensor | None,
    weights: Literal["sigmoid", "softmax"],
) -> Tensor:  # fmt: skip
    """Output `(B, Hq, n_q, Dv)` for q `(B, Hq, n_q, D)`, the last n_q positions, over k, v `(B, Hk, n_k, ...)`.

    window: keys a query reads, itself included. slopes: `(Hq,)` a_h, None for no bias. Logits and weights are computed in float32, or
    float64 where the inputs are.
    """
    n_q, n_k, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.unflatten(1, (kv_heads, -1))
    by_head = None if slopes is None else slopes.to(q.device, exact).view(kv_heads, -1, 1, 1)
    offset, out = n_k - n_q, []
    for chunk in chunks(n_q, n_k, window):
        rows = grouped[..., chunk.begin - offset : chunk.end - offset, :]
        keys, values = (x[:, :, chunk.first : chunk.end].unsqueeze(2) for x in (k, v))
        logits = (rows @ keys.mT).to(exact) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        places = torch.arange(chunk.first, chunk.end, device=q.device)
        distance = places[chunk.begin - chunk.first :].unsqueeze(1) - places
        if by_head is not None:
            logits = logits + by_head * distance
        logits = logits.masked_fill((distance < 0) | (distance >= window), -torch.inf)
        p = logits.sigmoid() if weights == "sigmoid" else logits.softmax(-1)
        out.append(p.to(v.dtype) @ values)
    return torch.cat(out, 3).flatten(1, 2)
