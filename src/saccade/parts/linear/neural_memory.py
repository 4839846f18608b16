"""A memory that is trained while it is read: a small network per sequence and key head, its weights moved by every token.

    loss_t = |M(base; k_t) - v_t|^2,    u_t = -theta_t d loss_t / d base          base: the weights at the start of the token's chunk
    S_t = eta_t S_{t-1} + u_t,    W_t = (1 - alpha_t) W_{t-1} + S_t,    y_t = M(W_t; q_t)

The gradient of a token at a layer of M is an outer product a_t d_t^T of what the layer was given and what came back to it, so inside a
chunk no weights are made for single tokens. Unrolled, both recurrences are

    W_j = A_j W_0 + B_j S_0 + sum_{i <= j} C_ji u_i,    C = D E,   E_mi = prod_{i < r <= m} eta_r,   D_jm = prod_{m < r <= j} (1 - alpha_r)

and x W_j = A_j x W_0 + B_j x S_0 - sum_{i <= j} C_ji theta_i (x . a_i) d_i: a few matrix products a layer and chunk, for M of any depth.
`MemoryRule.chunk` = 1 takes every gradient at the newest weights. Source: titans, arXiv 2501.00663.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from saccade.core import MixerShape
from saccade.parts.linear.conv import ShortConv
from saccade.parts.linear.gates import heads_first
from saccade.parts.linear.pieces import pieces

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """depth: layers of M. expand: their inner width in multiples of head_dim. residual: M(x) = x + norm(layers of x) in place of the layers
    alone. loss: over the channels of a value, "sum" or "mean" (which makes steps smaller by head_dim). momentum: whether S goes on from
    token to token, or is u_t. forget: whether weights decay. max_step: theta lies below it. chunk: tokens whose gradients are taken at the
    same weights. conv: width of the short convolutions in tokens, 0 for none. ValueError for what can't be."""

    depth: int = 2
    expand: int = 4
    residual: bool = False
    loss: Literal["sum", "mean"] = "sum"
    momentum: bool = True
    forget: bool = True
    max_step: float = 0.1
    chunk: int = 16
    conv: int = 4

    def __post_init__(self) -> None:
        for name in ("depth", "expand", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.loss not in ("sum", "mean"):
            raise ValueError(f"loss={self.loss!r} is not 'sum' or 'mean'")
        if self.conv < 0:
            raise ValueError(f"conv={self.conv}: give a width in tokens, 0 for no convolution")
        if self.max_step <= 0:
            raise ValueError(f"max_step={self.max_step}: give a positive step, or the memory never learns")


class Rates(NamedTuple):
    """theta `(B, H, n)` steps; log_eta and log_keep `(B, H, n)` logarithms of eta and 1 - alpha, None for eta = 0 and alpha = 0."""

    theta: Tensor
    log_eta: Tensor | None
    log_keep: Tensor | None

    def part(self, begin: int, end: int) -> Rates:
        """Those of tokens begin ... end - 1."""
        eta, keep = (None if x is None else x[..., begin:end] for x in self[1:])
        return Rates(self.theta[..., begin:end], eta, keep)


class Unrolled(NamedTuple):
    """The coefficients above: A `(B, H, n)`, B `(B, H, n)`, C `(B, H, n, n)`; of S_n: on S_0 `(B, H)` and on each u_i `(B, H, n)`."""

    weights: Tensor
    speed: Tensor
    tokens: Tensor
    last_speed: Tensor
    last_tokens: Tensor


def unroll(rates: Rates) -> Unrolled:
    """The two recurrences over the n tokens of a piece as coefficients on where they start and on the tokens."""
    theta = rates.theta
    log_keep = torch.zeros_like(theta) if rates.log_keep is None else rates.log_keep
    keep = _products(log_keep)
    if rates.log_eta is None:
        eye = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device).expand_as(keep)
        carried, first = eye, torch.zeros_like(theta)
    else:
        carried, first = _products(rates.log_eta), rates.log_eta.cumsum(-1).exp()
    speed = (keep @ first.unsqueeze(-1)).squeeze(-1)
    return Unrolled(log_keep.cumsum(-1).exp(), speed, keep @ carried, first[..., -1], carried[..., -1, :])


def _products(logs: Tensor) -> Tensor:
    """`prod_{i < r <= m} e^(l_r)` at row m and column i <= m, 0 above: logs `(..., n)` to `(..., n, n)`."""
    total = logs.cumsum(-1)
    above = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=logs.device).triu(1)
    return (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, float("-inf")).exp()


# -- the network inside ----------------------------------------------------------------------------------------------------


def network(x: Tensor, weights: Sequence[Tensor], residual: bool) -> Tensor:
    """M(x) `(B, H, ..., D)` of x `(B, H, ..., D)`, weights one `(B, H, in, out)` a layer."""
    h = x
    for index, weight in enumerate(weights):
        h = _through(F.silu(h) if index else h, weight)
    return x + _normed(h) if residual else h


def gradients(k: Tensor, v: Tensor, base: Sequence[Tensor], rule: MemoryRule) -> list[tuple[Tensor, Tensor]]:
    """For each layer a `(B, H, n, in)` and d `(B, H, n, out)`: token t's loss has the gradient a_t d_t^T at the layer's base."""
    given, made = [k], []
    for index, weight in enumerate(base):
        made.append(given[-1] @ weight)
        if index < len(base) - 1:
            given.append(F.silu(made[-1]))
    h = made[-1]
    back = 2 * ((k + _normed(h) if rule.residual else h) - v)
    if rule.loss == "mean":
        back = back / v.shape[-1]
    if rule.residual:
        size = (h.square().mean(-1, keepdim=True) + EPS).rsqrt()
        back = size * (back - h * size * (back * h * size).mean(-1, keepdim=True))
    found = [(given[-1], back)]
    for index in range(len(base) - 1, 0, -1):
        gate = made[index - 1].sigmoid()
        back = (back @ base[index].mT) * gate * (1 + made[index - 1] * (1 - gate))
        found.append((given[index - 1], back))
    return found[::-1]


def _through(x: Tensor, weight: Tensor) -> Tensor:
    """x `(B, H, ..., in)` times weight `(B, H, in, out)`."""
    return (x.flatten(2, -2) @ weight).unflatten(2, x.shape[2:-1])


def _normed(h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], eps=EPS)


class Memory(NamedTuple):
    """weights, speed and base: one `(B, H, in, out)` a layer, in float32 at least."""

    weights: list[Tensor]
    speed: list[Tensor]
    base: list[Tensor]


def learn(q: Tensor, k: Tensor, v: Tensor, rates: Rates, memory: Memory, rule: MemoryRule) -> tuple[Tensor, Memory]:
    """(y `(B, H, G, n, D)`, the memory after) of q `(B, H, G, n, D)`, k and v `(B, H, n, D)`, tokens of one chunk: j is read from W_j."""
    steps = unroll(rates)
    own, speed, tokens = (x.unsqueeze(2) for x in (steps.weights.unsqueeze(-1), steps.speed.unsqueeze(-1), steps.tokens))
    x, weights, speeds = q, [], []
    for index, (a, d) in enumerate(gradients(k, v, memory.base, rule)):
        before, moving = memory.weights[index], memory.speed[index]
        moves = -rates.theta.unsqueeze(-1) * d
        x = F.silu(x) if index else x
        scores = tokens * (x @ a.unsqueeze(2).mT)
        x = own * _through(x, before) + speed * _through(x, moving) + scores @ moves.unsqueeze(2)
        last = [one[..., -1, None, None] for one in (steps.weights, steps.speed)]
        weights.append(last[0] * before + last[1] * moving + (a * steps.tokens[..., -1, :, None]).mT @ moves)
        speeds.append(steps.last_speed[..., None, None] * moving + (a * steps.last_tokens.unsqueeze(-1)).mT @ moves)
    return q + _normed(x) if rule.residual else x, Memory(weights, speeds, memory.base)


def learn_one(q: Tensor, k: Tensor, v: Tensor, rates: Rates, memory: Memory, rule: MemoryRule) -> tuple[Tensor, Memory]:
    """`learn` of a single token by the definition: one gradient, the two recurrences, one read."""

    def loss(base: list[Tensor]) -> Tensor:
        square = (network(k, base, rule.residual) - v).square()
        return square.sum() if rule.loss == "sum" else square.mean(-1).sum()

    theta = rates.theta.unsqueeze(-1)
    eta = 0.0 if rates.log_eta is None else rates.log_eta.exp().unsqueeze(-1)
    keep = 1.0 if rates.log_keep is None else rates.log_keep.exp().unsqueeze(-1)
    speed = [eta * moving - theta * found for moving, found in zip(memory.speed, grad(loss)(memory.base), strict=True)]
    weights = [keep * before + moving for before, moving in zip(memory.weights, speed, strict=True)]
    return network(q, weights, rule.residual), Memory(weights, speed, memory.base)


# -- the layer -------------------------------------------------------------------------------------------------------------


class NeuralMemory(nn.Module):
    """Tokens `(B, N, dim)` written to a memory of every key head and read from it by the query heads of its group.

        q, k, v = conv(silu(W x)), q and k of length 1,   theta = max_step sigmoid(.), eta = sigmoid(.), alpha = sigmoid(.) of x

    The weights a memory starts with are learned. Kept: weights, speed and base of every memory, and what the convolutions saw last.
    """

    def __init__(self, shape: MixerShape, rule: MemoryRule) -> None:
        super().__init__()
        self.shape, self.rule = shape, rule
        d, heads = shape.head_dim, shape.kv_heads
        self.q_proj = nn.Linear(shape.dim, shape.heads * d, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(shape.dim, heads * d, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(shape.heads * d, shape.dim, bias=False)
        self.convs = nn.ModuleDict()
        if rule.conv:
            for name, count in (("q", shape.heads), ("k", heads), ("v", heads)):
                self.convs[name] = ShortConv(count * d, rule.conv, activation=None)
        # small steps and slow forgetting at first: of theta, eta, alpha
        starts = {"theta": -2.0} | ({"eta": 0.0} if rule.momentum else {}) | ({"alpha": -4.0} if rule.forget else {})
        self.rate_names = tuple(starts)
        # nothing moves on by itself without momentum, and in chunks of one token the base is the weights
        self.kept = ("weights", *(("speed",) if rule.momentum else ()), *(("base",) if rule.chunk > 1 else ()))
        self.rate_proj = nn.Linear(shape.dim, len(starts) * heads)
        self.rate_proj.keeps_init = True  # pyright: ignore[reportArgumentType] (models that set up their maps alike leave this one)
        with torch.no_grad():
            nn.init.normal_(self.rate_proj.weight, std=0.02)
            self.rate_proj.bias.copy_(torch.tensor(list(starts.values())).repeat_interleave(heads))
        widths = [d, *[rule.expand * d] * (rule.depth - 1), d]
        self.first = nn.ParameterList(nn.Parameter(torch.randn(heads, into, out) * into**-0.5) for into, out in pairwise(widths))

    def begin(self, x: Tensor) -> Memory:
        """The memories of x `(B, N, dim)` before its first token."""
        wide = torch.promote_types(x.dtype, torch.float32)
        # copies: a state outlives what an optimiser does to the parameters
        weights = [weight.to(wide).expand(x.shape[0], -1, -1, -1).clone() for weight in self.first]
        return Memory(weights, [torch.zeros_like(weight) for weight in weights], list(weights))

    def forward(self, x: Tensor, past: Mapping[str, Any], start: int) -> tuple[Tensor, dict[str, Any]]:
        """(y `(B, N, dim)`, what to keep): every token of x is written, then read. start: tokens before these."""
        q, k, v, rates, kept = self.project(x, past)
        memory, outs = self.unpack(past, x), []
        for begin, end in pieces(start, x.shape[1], self.rule.chunk):
            memory = self._based(memory, start + begin)
            own = rates.part(begin, end)
            out, memory = learn(q[..., begin:end, :], k[:, :, begin:end], v[:, :, begin:end], own, memory, self.rule)
            outs.append(out)
        return self.finish(torch.cat(outs, 3), x), kept | self.pack(memory)

    def one_by_one(self, x: Tensor, past: Mapping[str, Any], start: int) -> tuple[Tensor, dict[str, Any]]:
        """`forward` by the definition, token after token: its oracle."""
        q, k, v, rates, kept = self.project(x, past)
        memory, outs = self.unpack(past, x), []
        for t in range(x.shape[1]):
            memory = self._based(memory, start + t)
            own = rates.part(t, t + 1)
            out, memory = learn_one(q[..., t : t + 1, :], k[:, :, t : t + 1], v[:, :, t : t + 1], own, memory, self.rule)
            outs.append(out)
        return self.finish(torch.cat(outs, 3), x), kept | self.pack(memory)

    def recall(self, x: Tensor, tail: Tensor | None, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """(y `(B, N, dim)`, the convolution's new tail): what these weights, which stay as they are, hold for x `(B, N, dim)`."""
        q, tail = self.ask(x, tail)
        return self.finish(network(q, weights, self.rule.residual), x), tail

    def ask(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(q `(B, Hk, G, N, D)`, the convolution's new tail)."""
        q, tail = self._heads("q", x, tail)
        return _unit(q).unflatten(1, (self.shape.kv_heads, -1)), tail

    def project(self, x: Tensor, past: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Rates, dict[str, Any]]:
        """(q `(B, Hk, G, N, D)`, k and v `(B, Hk, N, D)`, the rates, the convolutions' tails), in float32 at least."""
        q, q_tail = self.ask(x, past.get("q_tail"))
        k, k_tail = self._heads("k", x, past.get("k_tail"))
        v, v_tail = self._heads("v", x, past.get("v_tail"))
        logits = self.rate_proj(x).to(q.dtype).mT.unflatten(1, (len(self.rate_names), -1))
        found = dict(zip(self.rate_names, logits.unbind(1), strict=True))
        rates = Rates(
            self.rule.max_step * found["theta"].sigmoid(), F.logsigmoid(found["eta"]) if "eta" in found else None,
            F.logsigmoid(-found["alpha"]) if "alpha" in found else None,
        )  # fmt: skip
        tails = {"q_tail": q_tail, "k_tail": k_tail, "v_tail": v_tail}
        return q, _unit(k), v, rates, {name: tail for name, tail in tails.items() if tail is not None}

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """y `(B, N, dim)` of what was read `(B, Hk, G, N, D)`."""
        return self.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2).to(x.dtype))

    def pack(self, memory: Memory) -> dict[str, Any]:
        return {name: {str(i): weight for i, weight in enumerate(getattr(memory, name))} for name in self.kept}

    def unpack(self, past: Mapping[str, Any], x: Tensor) -> Memory:
        """The memories that `pack` put away, or new ones for x."""
        if "weights" not in past:
            return self.begin(x)
        found = {name: [past[name][str(i)] for i in range(self.rule.depth)] for name in self.kept}
        weights = found["weights"]
        speed = found["speed"] if "speed" in found else [torch.zeros_like(weight) for weight in weights]
        return Memory(weights, speed, found.get("base", weights))

    def _based(self, memory: Memory, place: int) -> Memory:
        """The memory before the token at this place: where a chunk begins, gradients move on to the weights of now."""
        return memory._replace(base=memory.weights) if place % self.rule.chunk == 0 else memory

    def _heads(self, name: str, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        made = F.silu(getattr(self, f"{name}_proj")(x))
        if name in self.convs:
            made, tail = self.convs[name](made, tail)
        wide = torch.promote_types(x.dtype, torch.float32)
        return heads_first(made.to(wide), self.shape.kv_heads if name != "q" else self.shape.heads), tail


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
