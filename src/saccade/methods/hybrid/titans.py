"""Titans: attention for what is near, beside a memory that goes on learning while the model runs; three ways to join them.

    memory:  parts.linear.neural_memory, W_t from W_{t-1} by a gradient step with momentum and forgetting;  M_t(x) = M(W_t; W_q x)
    "mac" (as context), segments of C tokens s:   h = M_0(s),  0: at the segment's start
              y = softmax attention of s over [P; h; s],   write y,   out_t = norm(y_t) * f(norm(M_t(y_t)))
    "mag" (as gate):    out = norm(y) * f(norm(m)),   y = window attention over [P; x],   m_t = M_t(x_t) after writing x
    "mal" (as layer):   out = window attention over M([P; x])
    "lmm":              out = M(x), the memory alone

P are learned vectors that every query sees, at the front of each segment or of the sequence. In "mac" token t sees h_j and s_j of its
segment for j <= t: h_j is made from s_j, so those of later tokens would tell the future. Which norms and which f the gate has is
inferred: RMS norms with a weight each, f silu, with which recall across segments is learned in fewer steps than with a sigmoid.

Source: titans, arXiv 2501.00663.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.methods.linear.softmax import Softmax, SoftmaxMixer
from saccade.parts.linear.neural_memory import MemoryRule, NeuralMemory
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.pieces import pieces

KEPT = ("memory_k", "memory_v", "token_k", "token_v")  # of a segment in "mac"


@register
@dataclass(frozen=True, kw_only=True)
class Titans(Mixer):
    """form: how memory and attention are joined. segment: C, tokens of a segment ("mac"). window: tokens a query sees, its own among them
    ("mag", "mal"). persistent: vectors in P. gate: f. theta: base of the rotary embedding of attention.

    Of the memory: depth: its layers. expand: their inner width in multiples of head_dim. residual: M(x) = x + norm(layers of x) in place of
    the layers alone. loss: "sum" or "mean" over the channels of a value. momentum, forget: whether eta and alpha are there, or 0. max_step:
    theta_t lies below it. chunk: tokens whose gradients are taken at the same weights. conv: width of the short convolutions in tokens, 0
    for none."""

    form: Literal["mac", "mag", "mal", "lmm"] = "mac"
    segment: int = 2048
    window: int = 2048
    persistent: int = 4
    gate: Literal["silu", "sigmoid"] = "silu"
    theta: float = 10000.0
    depth: int = 2
    expand: int = 4
    residual: bool = False
    loss: Literal["sum", "mean"] = "sum"
    momentum: bool = True
    forget: bool = True
    max_step: float = 0.1
    chunk: int = 16
    conv: int = 4

    info = Info(
        slug="titans", phase="mixer", needs=frozenset({"training"}),
        tiny={"segment": 16, "window": 8, "chunk": 8, "expand": 2},
        variants=(
            {"form": "mag", "window": 8, "chunk": 5, "expand": 2, "residual": True, "loss": "mean", "max_step": 1.0},
            {"form": "mal", "window": 8, "chunk": 16, "depth": 1, "gate": "sigmoid"},
            {"form": "lmm", "depth": 3, "expand": 1, "chunk": 4, "conv": 2, "momentum": False},
            {"segment": 10, "chunk": 7, "persistent": 0, "depth": 1, "conv": 0, "forget": False, "gate": "sigmoid"},
            {"form": "mal", "persistent": 0, "window": 1, "chunk": 1, "expand": 1},
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.form not in ("mac", "mag", "mal", "lmm"):
            raise ValueError(f"form={self.form!r} is not 'mac', 'mag', 'mal' or 'lmm'")
        if self.segment < 1 or self.window < 1:
            raise ValueError(f"segment={self.segment}, window={self.window}: give at least 1 token")
        if self.persistent < 0:
            raise ValueError(f"persistent={self.persistent}: give a number of vectors, 0 for none")
        if self.gate not in ("sigmoid", "silu"):
            raise ValueError(f"gate={self.gate!r} is not 'silu' or 'sigmoid'")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")
        _ = self.rule  # its fields are checked there

    @property
    def rule(self) -> MemoryRule:
        """What the memory is told."""
        return MemoryRule(**{field.name: getattr(self, field.name) for field in fields(MemoryRule)})

    def build(self, shape: MixerShape) -> TokenMixer:
        return {"mac": AsContext, "mag": AsGate, "mal": AsLayer, "lmm": Alone}[self.form](shape, self)


class Alone(TokenMixer):
    """The memory as a layer by itself."""

    def __init__(self, shape: MixerShape, method: Titans) -> None:
        super().__init__(shape)
        self.method = method
        self.memory = NeuralMemory(shape, method.rule)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        return self.memory(x, past, int(call.start[0]))

    def naive(self, x: Tensor) -> Tensor:
        return self.memory.one_by_one(x, {}, 0)[0]


class WithAttention(TokenMixer):
    """What the three forms share: a memory, attention, persistent vectors P."""

    def __init__(self, shape: MixerShape, method: Titans) -> None:
        super().__init__(shape)
        self.method = method
        self.memory = NeuralMemory(shape, method.rule)
        window = None if method.form == "mac" else method.window
        sinks = 0 if window is None else method.persistent
        attention = Softmax(window=window, sinks=sinks, theta=method.theta).module(shape)
        assert isinstance(attention, SoftmaxMixer)
        self.attention = attention
        self.persistent = nn.Parameter(torch.randn(method.persistent, shape.dim)) if method.persistent else None

    def front(self, x: Tensor) -> Tensor:
        """P `(B, persistent, dim)` for the rows of x."""
        return x[:, :0] if self.persistent is None else self.persistent.to(x.dtype).expand(x.shape[0], -1, -1)

    def behind(self, x: Tensor, call: Call) -> tuple[Tensor, Call]:
        """The tokens with P before the first of them, and the facts of a call in which P counts."""
        count, first = self.method.persistent, int(call.start[0]) == 0
        positions = call.positions + count
        if first:
            x = torch.cat([self.front(x), x], dim=1)
            positions = torch.cat([torch.arange(count, device=x.device).expand(x.shape[0], -1), positions], dim=1)
        return x, Call(positions=positions, start=call.start if first else call.start + count, keep=call.keep)


class Gated(WithAttention):
    """The two forms whose output is attention's, gated by the memory's."""

    def __init__(self, shape: MixerShape, method: Titans) -> None:
        super().__init__(shape, method)
        self.attention_norm, self.memory_norm = (nn.RMSNorm(shape.dim, eps=1e-6) for _ in range(2))

    def gated(self, y: Tensor, m: Tensor) -> Tensor:
        act = F.sigmoid if self.method.gate == "sigmoid" else F.silu
        return self.attention_norm(y) * act(self.memory_norm(m))


class AsGate(Gated):
    """MAG."""

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        tokens, after = self.behind(x, call)
        y, keys = self.attention.mix(tokens, past.get("attention", {}), after)
        m, memory = self.memory(x, past.get("memory", {}), int(call.start[0]))
        return self.gated(y[:, -x.shape[1] :], m), {"attention": keys, "memory": memory}

    def naive(self, x: Tensor) -> Tensor:
        y = self.attention.naive(torch.cat([self.front(x), x], dim=1))[:, self.method.persistent :]
        return self.gated(y, self.memory.one_by_one(x, {}, 0)[0])


class AsLayer(WithAttention):
    """MAL."""

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        tokens, after = self.behind(x, call)
        m, memory = self.memory(tokens, past.get("memory", {}), int(after.start[0]))
        y, keys = self.attention.mix(m, past.get("attention", {}), after)
        return y[:, -x.shape[1] :], {"attention": keys, "memory": memory}

    def naive(self, x: Tensor) -> Tensor:
        m = self.memory.one_by_one(torch.cat([self.front(x), x], dim=1), {}, 0)[0]
        return self.attention.naive(m)[:, self.method.persistent :]


class AsContext(Gated):
    """MAC. Positions are counted in each segment's own [P; h; s], where h_j and s_j are C apart."""

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        start, size, count = int(call.start[0]), self.method.segment, self.method.persistent
        past_memory, tail = past.get("memory", {}), past.get("tail")
        before: list[Tensor] = [past["before"][str(i)] for i in range(self.method.depth)] if past else []
        front = self._keys(self.front(x), 0)
        held = [past[name][:, : start % size].transpose(1, 2).to(x.dtype) for name in KEPT] if past else None
        outs = []
        for begin, end in pieces(start, x.shape[1], size):
            place = (start + begin) % size
            s = x[:, begin:end]
            if place == 0 or held is None:
                before, held = self.memory.unpack(past_memory, x).weights, None
            h, tail = self.memory.recall(s, tail, before)
            new = [*self._keys(h, count + place), *self._keys(s, count + size + place)]
            held = new if held is None else [torch.cat([old, own], dim=2) for old, own in zip(held, new, strict=True)]
            y = self._attend(s, front, held, place)
            m, past_memory = self.memory(y, past_memory, start + begin)
            outs.append(self.gated(y, m))
        kept: dict[str, Any] = {}
        if call.keep:
            assert held is not None
            kept = {"memory": past_memory, "before": {str(i): weight for i, weight in enumerate(before)}}
            kept |= {name: F.pad(one, (0, 0, 0, size - one.shape[2])).transpose(1, 2) for name, one in zip(KEPT, held, strict=True)}
            kept |= {} if tail is None else {"tail": tail}
        return torch.cat(outs, 1), kept

    def naive(self, x: Tensor) -> Tensor:
        size, count = self.method.segment, self.method.persistent
        front, state, tail, outs = self._keys(self.front(x), 0), {}, None, []
        before, held = [], []
        for t in range(x.shape[1]):
            s, place = x[:, t : t + 1], t % size
            if place == 0:
                before, held = self.memory.unpack(state, x).weights, []
            h, tail = self.memory.recall(s, tail, before)
            held.append([*self._keys(h, count + place), *self._keys(s, count + size + place)])
            # of the token's own segment, and no later one
            y = self._attend(s, front, [torch.cat(parts, 2) for parts in zip(*held, strict=True)], place)
            m, state = self.memory.one_by_one(y, state, t)
            outs.append(self.gated(y, m))
        return torch.cat(outs, 1)

    def _keys(self, x: Tensor, place: int) -> tuple[Tensor, Tensor]:
        return self.attention.keys(x, self._at(x, place))

    def _attend(self, s: Tensor, front: tuple[Tensor, Tensor], held: list[Tensor], place: int) -> Tensor:
        """y `(B, n, dim)` of tokens s from that place of their segment on, over P and what the segment holds so far: h and s."""
        n, m, count = s.shape[1], held[0].shape[2], self.method.persistent
        q = self.attention.queries(s, self._at(s, count + self.method.segment + place))
        own = torch.ones(n, m, dtype=torch.bool, device=s.device).tril(m - n)
        mask = torch.cat([own.new_ones(n, count), own, own], dim=1)
        k, v = (torch.cat([front[i], held[i], held[2 + i]], dim=2) for i in range(2))
        return self.attention.finish(partial_softmax(q, k, v, mask).out.to(s.dtype), s)

    @staticmethod
    def _at(x: Tensor, place: int) -> Call:
        """A call whose tokens stand from this place on."""
        places = place + torch.arange(x.shape[1], device=x.device)
        return Call(positions=places.expand(x.shape[0], -1), start=places.new_zeros(x.shape[0]), keep=False)
