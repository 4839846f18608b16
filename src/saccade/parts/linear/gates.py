"""Gates: how much of the state each token leaves, as natural logarithms of the decay.

A gate is called with the tokens x `(B, N, dim)`, the keys `(B, H, N, F)`, what it kept and the facts of the call, and gives a `Gated`:
the log decay in one of the forms `saccade.ops.scan` takes, the keys (some gates scale them), and what it keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call


@dataclass(frozen=True)
class Gated:
    """log_decay: None, `(H,)`, `(B, H, N)` or `(B, H, N, F)`, at most 0. keys `(B, H, N, F)`. carry: what the gate keeps, batch first,
    or None. level: `(B, H, N)` log of the unit in which the state is kept, of a gate that stabilises itself."""

    log_decay: Tensor | None
    keys: Tensor
    carry: Tensor | None = None
    level: Tensor | None = None


class Gate(nn.Module):
    """forward(x, keys, carry, call) -> Gated."""


class NoGate(Gate):
    """Nothing is forgotten."""

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        return Gated(None, keys)


class HeadGate(Gate):
    """A constant decay `exp(-slope)` for every head: slopes `(H,)`, at least 0 (see `slopes`), in float32 whatever the layer's dtype."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        self.slopes = slopes.float()

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        if self.slopes.device != x.device:
            self.slopes = self.slopes.to(x.device)
        return Gated(-self.slopes, keys)


class SoftplusGate(Gate):
    """`log g = -exp(A) softplus(W x + b)`, A per head: one number per token and head, or one per channel (kimi-linear).

    features: channels of a head for a gate per channel, None for one per token. rank: of W per channel (default: features).
    A starts as the logarithm of a uniform draw from 1 to 16, b so that softplus(b) is drawn from 0.001 to 0.1, both evenly in log scale for
    b.
    """

    def __init__(self, dim: int, heads: int, features: int | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.heads, self.features = heads, features
        width = heads * (features or 1)
        if features is None:
            self.project: nn.Module = nn.Linear(dim, width, bias=False)
        else:
            low = rank or features
            self.project = nn.Sequential(nn.Linear(dim, low, bias=False), nn.Linear(low, width, bias=False))
        self.a_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        step = torch.exp(torch.rand(width) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        wide = torch.promote_types(x.dtype, torch.float32)
        amount = F.softplus(self.project(x).to(wide) + self.bias.to(wide))
        amount = heads_first(amount, self.heads)
        log_decay = -self.a_log.to(wide).exp()[:, None, None] * amount
        return Gated(log_decay.squeeze(-1) if self.features is None else log_decay, keys)


class SigmoidGate(Gate):
    """`log g = logsigmoid(W x + b) / temperature`: per token, or per channel with `features` (gated linear attention: temperature 16, W of
    rank 16). floor: lower bound of g, `g = floor + (1 - floor) sigmoid`."""

    def __init__(
        self, dim: int, heads: int, features: int | None = None, rank: int | None = 16, temperature: float = 16.0, floor: float = 0.0
    ) -> None:
        super().__init__()
        if temperature <= 0 or not 0 <= floor < 1:
            raise ValueError(f"temperature={temperature}, floor={floor}: give a positive temperature and a floor from 0 to below 1")
        self.heads, self.features, self.temperature, self.floor = heads, features, temperature, floor
        width = heads * (features or 1)
        if features is None or rank is None:
            self.project: nn.Module = nn.Linear(dim, width)
        else:
            self.project = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, width))

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        wide = torch.promote_types(x.dtype, torch.float32)
        log_decay = F.logsigmoid(heads_first(self.project(x).to(wide), self.heads)) / self.temperature
        if self.floor:
            log_decay = torch.log(self.floor + (1 - self.floor) * log_decay.exp())
        return Gated(log_decay.squeeze(-1) if self.features is None else log_decay, keys)


class CumulativeSoftmaxGate(Gate):
    """Keys as logits: every channel is a softmax over the tokens so far (latte, lightnet, causal efficient attention).

        Z_t = log sum_{s <= t} exp(k_s),    key'_t = exp(k_t - Z_t),    log g_t = Z_{t-1} - Z_t

    so that the state is the mean of the values under that softmax, for each channel. Keeps Z `(B, H, F)`.
    """

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        wide = torch.promote_types(keys.dtype, torch.float32)
        logits = call.masked(keys.to(wide), -1e30)
        n = logits.shape[2]
        joined = logits if carry is None else torch.cat([carry.to(wide).unsqueeze(2), logits], dim=2)
        sums = joined.logcumsumexp(2)
        now = sums[:, :, -n:]
        # nothing is kept before the first token, so its decay is free: 0 keeps the gradient finite
        before = torch.cat([now[:, :, :1], now[:, :, :-1]], dim=2) if carry is None else sums[:, :, :n]
        return Gated((before - now).clamp(max=0), (logits - now).exp().to(keys.dtype), now[:, :, -1])


class StabilisedGate(Gate):
    """An exponential input gate and a forget gate, both from x, kept in range by a running maximum (mLSTM, blalm).

        m_t = max(log f_t + m_{t-1}, a_t),    key'_t = exp(a_t - m_t) k_t,    log g_t = log f_t + m_{t-1} - m_t

    log f = logsigmoid(W_f x + b_f), a = W_i x + b_i. Keeps m `(B, H)` and reports it as `level`: the true state is exp(m) times the kept.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, 2 * heads)
        self.project.keeps_init = True  # pyright: ignore[reportArgumentType] (models that set up their maps alike leave this one)
        with torch.no_grad():
            self.project.bias[heads:] = torch.linspace(3.0, 6.0, heads)

    def forward(self, x: Tensor, keys: Tensor, carry: Tensor | None, call: Call) -> Gated:
        wide = torch.promote_types(x.dtype, torch.float32)
        write, forget = self.project(x).to(wide).mT.unflatten(1, (2, self.heads)).unbind(1)
        forget = call.masked(F.logsigmoid(forget))
        write = call.masked(write, -1e30)
        total = forget.cumsum(-1)
        level = total + (write - total).cummax(-1).values
        if carry is not None:
            level = torch.maximum(level, total + carry.to(wide).unsqueeze(-1))
        # before the first token there is no state, and any level serves
        first = level[..., :1] - forget[..., :1] if carry is None else carry.to(wide).unsqueeze(-1)
        before = torch.cat([first, level[..., :-1]], dim=-1)
        scaled = keys.to(wide) * (write - level).exp().unsqueeze(-1)
        return Gated((forget + before - level).clamp(max=0), scaled.to(keys.dtype), level[..., -1], level)


def heads_first(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H * F)` as `(B, H, N, F)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
