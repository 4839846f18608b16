"""Single-headed attention RNN: an LSTM, one cheap attention head over a long memory, and a feed-forward layer without a second matrix.

    h = LSTM(LN x)                                                          no residual
    m = LN h,   q = LN(W_q LN h) * sigmoid(a_q),   k = m * sigmoid(a_k),   v = m * g        one d x d product in all
    h = h + softmax(q k^T d^-1/2) v                                         over the memory, and causally over the segment
    y = LN h + boom(LN h),    boom(x) = sum of the d-wide pieces of u sigmoid(1.702 u),  u = W x

The memory is m of the last tokens before the segment. g = sigmoid(f) tanh(c), (c, f) = W_g sigmoid(a_v), is a vector with more parameters
than it needs, which `fold` makes a constant. Order comes from the LSTM: there are no positions. The paper stores the tokens between two
segments without gradients: `MixerState.detach` does that. It is a block of its own: in a decoder use `intermediate_size=0`.

Source: sha-rnn, arXiv 1911.11423.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, register
from saccade.parts.linear.partial import partial_softmax
from saccade.parts.linear.pieces import pieces
from saccade.parts.linear.tokens import last_tokens


@register
@dataclass(frozen=True, kw_only=True)
class ShaRNN(Mixer):
    """attend: the layers with attention: "second-last" (the paper's cheap model), "all" or "none". memory: tokens before the segment that
    stay visible. segment: tokens of a segment. wide: width of the LSTM, boom: width of the feed-forward layer, both in multiples of dim.
    dropout: probability, on what attention and the feed-forward layer add, in training."""

    attend: Literal["second-last", "all", "none"] = "second-last"
    memory: int = 5000
    segment: int = 1024
    wide: int = 1
    boom: int = 4
    dropout: float = 0.1

    info = Info(
        slug="sha-rnn", phase="mixer", needs=frozenset({"training"}),
        tiny={"attend": "all", "memory": 20, "segment": 16, "dropout": 0.0},
        variants=({"attend": "all", "wide": 2, "boom": 1, "dropout": 0.0}, {"dropout": 0.0}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.attend not in ("second-last", "all", "none"):
            raise ValueError(f"attend={self.attend!r} is not 'second-last', 'all' or 'none'")
        if self.memory < 0 or self.segment < 1:
            raise ValueError(f"memory={self.memory}, segment={self.segment}: give at least 0 tokens of memory and 1 of a segment")
        if self.wide < 1 or self.boom < 1:
            raise ValueError(f"wide={self.wide}, boom={self.boom}: give multiples of the width, at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: give a probability from 0 to below 1")

    def build(self, shape: MixerShape) -> TokenMixer:
        return ShaMixer(shape, self, self.attend == "all" or (self.attend == "second-last" and shape.layer == max(shape.layers - 2, 0)))


class VectorGate(nn.Module):
    """The vector g `(dim,)`; `fold` keeps its value and lets go of what made it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.raw: nn.Parameter | None = nn.Parameter(torch.zeros(dim))
        self.project: nn.Linear | None = linear(dim, 2 * dim)
        self.value: nn.Parameter | None = None

    def forward(self) -> Tensor:
        if self.raw is None or self.project is None:
            assert self.value is not None
            return self.value
        change, forget = self.project(self.raw.sigmoid()).chunk(2)
        return forget.sigmoid() * change.tanh()

    @torch.no_grad()
    def fold(self) -> None:
        self.value = nn.Parameter(self())
        self.raw = self.project = None


class ShaMixer(TokenMixer):
    """The layer. attends: whether it has attention."""

    def __init__(self, shape: MixerShape, method: ShaRNN, attends: bool) -> None:
        super().__init__(shape)
        d = shape.dim
        self.method, self.attends = method, attends
        self.lstm = nn.LSTM(d, method.wide * d, batch_first=True)
        self.start_norm, self.feed_norm, self.feed_in_norm = (norm(d) for _ in range(3))
        if attends:
            self.memory_norm, self.middle_norm, self.query_norm = (norm(d) for _ in range(3))
            self.q_proj = linear(d, d)
            self.q_scale, self.k_scale = (nn.Parameter(torch.zeros(d)) for _ in range(2))
            self.v_gate = VectorGate(d)
        self.boom = linear(d, method.boom * d)

    @property
    def reach(self) -> int:
        """Tokens before a token that it may have to see."""
        return self.method.memory + self.method.segment - 1

    def fold(self) -> None:
        """Replace the parameters behind the values' vector by the vector itself, for inference."""
        if self.attends:
            self.v_gate.fold()

    # -- the block in three steps ------------------------------------------------------------------------------------------

    def recur(self, x: Tensor, past: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """h `(B, N, dim)` and the LSTM's state, both `(B, wide * dim)`, computed in float32 at least, under autocast too."""
        wide = torch.promote_types(x.dtype, torch.float32)
        before = (past["h"].unsqueeze(0), past["c"].unsqueeze(0)) if past else None
        weights = {name: p.to(wide) for name, p in self.lstm.named_parameters()}
        given = self.start_norm(x).to(wide)
        with torch.autocast(x.device.type, enabled=False):
            if wide == x.dtype:
                out, (h, c) = self.lstm(given, before)
            else:
                out, (h, c) = functional_call(self.lstm, weights, (given, before))
        return self.narrow(out, x), {"h": h.squeeze(0), "c": c.squeeze(0)}

    def narrow(self, out: Tensor, x: Tensor) -> Tensor:
        return out.unflatten(-1, (self.method.wide, self.dim)).sum(-2).to(x.dtype)

    def read(self, q: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """One head: q `(B, n, d)` over the stored tokens `(B, m, d)` where mask `(n, m)` is True."""
        k, v = source * self.k_scale.sigmoid(), source * self.v_gate()
        return partial_softmax(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask).out.squeeze(1).to(q.dtype)

    def queries(self, h: Tensor) -> Tensor:
        return self.query_norm(self.q_proj(self.middle_norm(h))) * self.q_scale.sigmoid()

    def feed(self, h: Tensor) -> Tensor:
        u = self.boom(self.feed_in_norm(h))
        u = (u * (1.702 * u).sigmoid()).unflatten(-1, (self.method.boom, self.dim)).sum(-2)
        return self.feed_norm(h) + self._drop(u)

    # -- the forms ---------------------------------------------------------------------------------------------------------

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        h, kept = self.recur(x, past)
        if not self.attends:
            return self.feed(h), kept
        new, q = self.memory_norm(h), self.queries(h)
        held = past["memory"].to(x.dtype) if past else x.new_zeros(x.shape[0], self.reach, self.dim)
        if call.keep:
            kept["memory"] = last_tokens(held, new, None)
        start = int(call.start[0])
        first = max(start - self.reach, 0)
        source = torch.cat([held[:, self.reach - (start - first) :], new], dim=1)
        outs = []
        for begin, end in pieces(start, x.shape[1], self.method.segment):
            segment = (start + begin) // self.method.segment * self.method.segment
            seen = source[:, max(segment - self.method.memory, 0) - first : start + end - first]
            n, m = end - begin, seen.shape[1]
            mask = torch.ones(n, m, dtype=torch.bool, device=x.device).tril(m - n)
            outs.append(self.read(q[:, begin:end], seen, mask))
        return self.feed(h + self._drop(torch.cat(outs, 1))), kept

    def naive(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        w_in, w_back, b_in, b_back = (p.to(wide) for p in self.lstm.parameters())
        h = c = torch.zeros(x.shape[0], self.method.wide * self.dim, dtype=wide, device=x.device)
        steps = []
        for token in self.start_norm(x).to(wide).unbind(1):
            write, forget, content, out = (token @ w_in.mT + b_in + h @ w_back.mT + b_back).chunk(4, dim=-1)
            c = forget.sigmoid() * c + write.sigmoid() * content.tanh()
            h = out.sigmoid() * c.tanh()
            steps.append(h)
        y = self.narrow(torch.stack(steps, 1), x)
        if self.attends:
            j = torch.arange(x.shape[1], device=x.device)
            i = j[:, None]
            mask = (j <= i) & (j >= i // self.method.segment * self.method.segment - self.method.memory)
            y = y + self._drop(self.read(self.queries(y), self.memory_norm(y), mask))
        return self.feed(y)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.method.dropout, self.training)


def norm(dim: int) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-12)


def linear(dim: int, width: int) -> nn.Linear:
    """A map whose weights start with deviation 0.1 / sqrt(dim)."""
    made = nn.Linear(dim, width)
    nn.init.normal_(made.weight, std=0.1 * dim**-0.5)
    nn.init.zeros_(made.bias)
    made.keeps_init = True  # pyright: ignore[reportArgumentType] (models that set up their maps alike leave this one)
    return made
