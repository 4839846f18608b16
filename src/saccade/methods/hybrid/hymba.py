"""Hymba: attention heads and state space heads side by side in every layer, behind learned meta tokens that all of them read.

    inner width E = expand * dim,   queries, keys and values in heads of E / heads channels, keys and values shared by groups
    a = softmax attention over keys j <= i with  i - j < window  or  j < meta        with rotary positions, meta tokens counted
    s = silu(W_z x) * mamba(W_u x)                                                    parts.linear.selective
    y = W_o (norm_1(a) + norm_2(s)) / 2,    norms over E with their own weights

Three layers (first, middle, last) have no window; of two neighbouring window layers the second reads the first one's keys and values:
`hymba_layers` lists them for a decoder, whose `meta_tokens` must be the layers' `meta`.

Source: hymba, arXiv 2411.13676.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from saccade.core import Call, Info, Mixer, MixerShape, TokenMixer, format_spec, register
from saccade.methods.linear.softmax import Softmax, SoftmaxMixer
from saccade.parts.linear import mean_of_norms
from saccade.parts.linear.selective import SelectiveState


@register
@dataclass(frozen=True, kw_only=True)
class Hymba(Mixer):
    """window: tokens a query sees, its own among them; None: all (a global layer). meta: first tokens that stay visible behind a window.
    expand: inner width over dim. state: numbers the state space keeps per channel. conv: width of its short convolution in tokens.
    rank: of its steps' projection (default: dim / 16, rounded up). theta: base of the rotary embedding. kv_from: an earlier hymba layer
    with the same window and meta whose keys and values are read in place of own ones; they are kept there alone."""

    window: int | None = 1024
    meta: int = 128
    expand: int = 2
    state: int = 16
    conv: int = 4
    rank: int | None = None
    theta: float = 10000.0
    kv_from: int | None = None

    info = Info(
        slug="hymba", phase="mixer", needs=frozenset({"training"}), tiny={"window": 16, "meta": 3, "state": 4},
        variants=({"window": None, "meta": 0, "state": 3, "conv": 3}, {"window": 1, "meta": 2, "expand": 1, "rank": 1}),
        opts_out={"constant": "a layer without a window keeps the keys and values of all tokens"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.meta < 0 or (self.window is not None and self.window < 1):
            raise ValueError(f"window={self.window}, meta={self.meta}: give at least 1 token (or None for no window) and 0 meta tokens")
        if min(self.expand, self.state, self.conv, 1 if self.rank is None else self.rank) < 1:
            raise ValueError(f"expand={self.expand}, state={self.state}, conv={self.conv}, rank={self.rank}: give at least 1 of each")
        if self.theta <= 0:
            raise ValueError(f"theta={self.theta}: give a positive base")

    def build(self, shape: MixerShape) -> TokenMixer:
        if self.expand * shape.dim % (2 * shape.heads):
            raise ValueError(
                f"an inner width of {self.expand * shape.dim} can't be split among {shape.heads} heads of an even width: "
                "change dim, heads or expand"
            )
        return HymbaMixer(shape, self)


class HymbaMixer(TokenMixer):
    """The layer. The maps of its one input projection stand apart: attention's have the names they have in a softmax layer."""

    batches_padding = True

    def __init__(self, shape: MixerShape, method: Hymba) -> None:
        super().__init__(shape)
        inner = method.expand * shape.dim
        attention = Softmax(
            window=method.window, sinks=0 if method.window is None else method.meta, theta=method.theta, kv_from=method.kv_from
        )
        self.attention = attention.module(replace(shape, head_dim=inner // shape.heads))
        assert isinstance(self.attention, SoftmaxMixer)
        # both kinds of heads share one map out
        self.attention.o_proj = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.u_proj, self.z_proj = (nn.Linear(shape.dim, inner, bias=False) for _ in range(2))
        self.space = SelectiveState(inner, method.state, method.rank or -(-shape.dim // 16), method.conv)
        self.attention_norm, self.space_norm = (nn.RMSNorm(inner, eps=1e-6) for _ in range(2))
        self.o_proj = nn.Linear(inner, shape.dim, bias=False)

    def mix(self, x: Tensor, past: Mapping[str, Any], call: Call) -> tuple[Tensor, dict[str, Any]]:
        attended, keys = self.attention.mix(x, past.get("attention", {}), call)
        read, state = self.space(self.u_proj(x), past.get("space", {}), call)
        return self._merge(attended, read, x), {"attention": keys, "space": state}

    def naive(self, x: Tensor) -> Tensor:
        return self._merge(self.attention.naive(x), self.space.naive(self.u_proj(x), self.whole(x)), x)

    def _merge(self, attended: Tensor, read: Tensor, x: Tensor) -> Tensor:
        outs = [attended, read * F.silu(self.z_proj(x))]
        return self.o_proj(mean_of_norms(outs, [self.attention_norm.weight, self.space_norm.weight]))


def hymba_layers(count: int, *, everywhere: Sequence[int] | None = None, share: bool = True, **fields: Any) -> list[str]:
    """The specs of a model's layers: `SaccadeConfig(layers=hymba_layers(32), meta_tokens=128)`.

    everywhere: layers without a window (default: first, middle, last; 0, 15 and 31 of 32). share: every second one of neighbouring window
    layers reads the keys of the one before. fields: of the layers, such as window and meta. ValueError where a number is out of range.
    """
    full = {0, (count - 1) // 2, count - 1} if everywhere is None else set(everywhere)
    if count < 1 or any(not 0 <= index < count for index in full):
        raise ValueError(f"layers {sorted(full)} without a window are not all among {count} layers: count from 0")
    specs: list[str] = []
    owner: int | None = None
    for index in range(count):
        own = dict(fields)
        if index in full:
            own["window"], owner = None, None
        elif share and owner is not None:
            own["kv_from"], owner = owner, None
        else:
            owner = index
        specs.append(format_spec("hymba", own))
    return specs
